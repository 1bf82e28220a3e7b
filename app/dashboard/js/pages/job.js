/** One job: state, live curves, events, checkpoints and result, and the buttons that control it. */

import { html, useState } from "../html.js";
import { call, withQuery } from "../api.js";
import { bytes, date, duration, integer, number, percent, plural, words } from "../format.js";
import { useResource } from "../live.js";
import { go, link } from "../router.js";
import { Confirm } from "../parts/confirm.js";
import { Curves } from "../parts/curves.js";
import { JobEvents } from "../parts/job_events.js";
import { JobResult, Ladder, Samples } from "../parts/job_result.js";
import { useLiveJob } from "../parts/live_job.js";
import { ENDED, nameOf, parentOf, remainingSeconds } from "../parts/jobs.js";
import {
  Ago,
  Code,
  DataTable,
  ErrorNotice,
  Facts,
  Loading,
  PageHead,
  Progress,
  Section,
  Status,
} from "../parts/ui.js";

const ACTIONS = {
  pause: {
    title: "Pause the job?",
    text: "A running job stops at its next checkpoint. You can resume it at any time.",
    action: "Pause the job",
  },
  resume: {
    title: "Resume the job?",
    text: "It continues from its newest checkpoint, and its time limit starts anew.",
    action: "Resume the job",
  },
  cancel: {
    title: "Cancel the job?",
    text: "The job ends without a model, and its checkpoints are deleted. This cannot be undone.",
    action: "Cancel the job",
    isDanger: true,
  },
  delete: {
    title: "Delete the job?",
    text: "Its history and checkpoints are deleted. If it has a model, delete the model first.",
    action: "Delete the job",
    isDanger: true,
  },
};

function allowedActions(job) {
  if (job.status === "paused") return ["resume", "cancel"];
  if (job.status === "failed") return ["resume", "delete"];
  if (ENDED.has(job.status)) return ["delete"];
  return [job.pause_requested_at ? "resume" : "pause", "cancel"];
}

function Actions({ job, onChange }) {
  const [action, setAction] = useState(null);
  const path = `/v1/fine_tuning/jobs/${job.id}`;
  const act = async () => {
    if (action === "delete") {
      await call(path, { method: "DELETE" });
      go(["jobs"]);
      return;
    }
    onChange(await call(`${path}/${action}`, { method: "POST" }));
  };
  return html`${allowedActions(job).map(
      (name) =>
        html`<button type="button" key=${name} onClick=${() => setAction(name)}>
          ${words(name)}
        </button>`,
    )}
    <a class="button" href=${link(["compare"], { jobs: job.id })}>Compare</a>
    ${
      action &&
      html`<${Confirm} ...${ACTIONS[action]} onConfirm=${act} onClose=${() => setAction(null)} />`
    }`;
}

/** The stages of the job, with the time that each took. */
function Stages({ job }) {
  return html`<ol class="stages">
    ${job.stages.map((stage, i) => {
      const end =
        stage.finished_at ?? (ENDED.has(job.status) ? job.finished_at : Date.now() / 1000);
      return html`<li key=${i} data-status=${stage.status}>
        <${Status} value=${stage.status} note=${duration(Math.max(0, end - stage.started_at))} />
        <span>${words(stage.name)}</span>
      </li>`;
    })}
  </ol>`;
}

function Figure({ label, value, note }) {
  return html`<div class="figure">
    <dt>${label}</dt>
    <dd>${value}${note && html`<span class="muted"> ${note}</span>`}</dd>
  </div>`;
}

function Figures({ job }) {
  const { progress, latest_metrics: latest } = job;
  const isRunning = job.status === "running";
  const agreement = latest.valid_agreement ?? latest.train_agreement;
  const took = job.started_at && (job.finished_at ?? Date.now() / 1000) - job.started_at;
  return html`<dl class="figures">
    <${Figure} label="Progress" value=${`${(progress.percent ?? 0).toFixed(0)} %`} />
    ${
      isRunning
        ? html`<${Figure} label="Time left" value=${duration(remainingSeconds(job))} />`
        : html`<${Figure} label="Time" value=${duration(took)} />`
    }
    <${Figure}
      label="Step"
      value=${integer(progress.step)}
      note=${progress.total_steps ? `of ${integer(progress.total_steps)}` : ""}
    />
    ${
      progress.tokens_per_second > 0 &&
      html`<${Figure}
        label="Training"
        value=${integer(progress.tokens_per_second)}
        note="tokens/s"
      />`
    }
    <${Figure}
      label="Loss"
      value=${number(latest.valid_loss ?? latest.train_loss)}
      note="held-out"
    />
    ${
      latest.valid_kl !== undefined &&
      html`<${Figure} label="KL" value=${number(latest.valid_kl)} note="nats" />`
    }
    ${agreement !== undefined && html`<${Figure} label="Agreement" value=${percent(agreement)} />`}
  </dl>`;
}

function Checkpoints({ job, numChanges }) {
  const path = `/v1/fine_tuning/jobs/${job.id}/checkpoints`;
  const checkpoints = useResource(
    () => call(withQuery(path, { limit: 50 })),
    [job.id, job.status, numChanges],
  );
  const columns = [
    {
      title: "Step",
      cell: (row) =>
        html`${integer(row.step_number)}${row.is_best ? html` <span class="tag">best</span>` : ""}`,
    },
    { title: "Held-out loss", isNumber: true, cell: (row) => number(row.metrics.valid_loss) },
    { title: "Size", isNumber: true, cell: (row) => bytes(row.bytes) },
    {
      title: "Model",
      cell: (row) =>
        html`<a
          href=${link(["playground"], { a: parentOf(job), b: row.fine_tuned_model_checkpoint })}
          >Try it</a
        >`,
    },
  ];
  const rows = checkpoints.value?.data ?? [];
  return html`<${Section} title="Checkpoints">
    <${ErrorNotice} error=${checkpoints.error} />
    ${
      rows.length > 0
        ? html`<${DataTable}
            caption="Checkpoints, newest first"
            columns=${columns}
            rows=${rows}
            rowKey=${(row) => row.id}
          />`
        : html`<p class="muted">
            ${ENDED.has(job.status) ? "No checkpoint is kept." : "No checkpoint yet."}
          </p>`
    }
  <//>`;
}

function Configuration({ job }) {
  return html`<${Section} title="Configuration">
    <${Facts}
      pairs=${[
        ["Method", words(job.method.type)],
        [
          "Teacher",
          job.teacher && html`<a href=${link(["model", job.teacher])}>${job.teacher}</a>`,
        ],
        ["Start model", html`<a href=${link(["model", job.model])}>${job.model}</a>`],
        ["Training file", html`<code>${job.training_file}</code>`],
        ["Validation file", job.validation_file && html`<code>${job.validation_file}</code>`],
        ["Seed", job.seed],
        ["Created", date(job.created_at)],
        ["Attempt", job.attempt || null],
        ["Trained tokens", job.trained_tokens && integer(job.trained_tokens)],
        [
          "Metadata",
          Object.entries(job.metadata)
            .map((pair) => pair.join("="))
            .join(", "),
        ],
      ]}
    />
    <details>
      <summary>All options</summary>
      <${Code} label="Options as JSON" text=${JSON.stringify(job.method, null, 2)} />
    </details>
  <//>`;
}

export default function Job({ id }) {
  const { job, metrics, events, error, retry, setJob } = useLiveJob(id);
  if (error && !job)
    return html`<${PageHead} title="Job" /><${ErrorNotice} error=${error} onRetry=${retry} />`;
  if (!job) return html`<${PageHead} title="Job" /><${Loading} what="Loading the job" />`;
  const isWaiting = metrics.size === 0;
  return html`<${PageHead}
      title=${nameOf(job)}
      actions=${html`<${Actions} job=${job} onChange=${setJob} />`}
    >
      <p class="subline">
        <${Status}
          value=${job.status}
          note=${job.queue ? `${job.queue.position} of ${job.queue.depth} in the queue` : null}
        />
        <code>${job.id}</code>
        <span class="muted">created <${Ago} at=${job.created_at} /></span>
      </p>
    <//>
    <${ErrorNotice} error=${error} onRetry=${retry} />
    ${job.error.message && html`<div class="notice error"><p>${job.error.message}</p></div>`}
    ${
      job.pause_reason &&
      html`<div class="notice"><p>Paused by the service: ${job.pause_reason}</p></div>`
    }
    ${job.fine_tuned_model && html`<${Done} job=${job} />`}
    <section class="card" aria-label="Progress">
      <${Progress} value=${job.progress.percent} label="Progress of the job" />
      <${Figures} job=${job} />
      <${Stages} job=${job} />
    </section>
    <div class="columns">
      <div>
        <${Section} title="Curves">
          ${
            isWaiting
              ? html`<p class="muted">The curves begin with the first training step.</p>`
              : html`<${Curves} metrics=${metrics} />`
          }
        <//>
        ${job.result && html`<${JobResult} job=${job} />`}
        ${job.result?.ladder && html`<${Ladder} result=${job.result} />`}
        ${job.result?.samples?.length > 0 && html`<${Samples} result=${job.result} />`}
      </div>
      <div>
        <${Checkpoints}
          job=${job}
          numChanges=${events.filter((event) => event.message.includes("heckpoint")).length}
        />
        <${JobEvents} job=${job} events=${events} />
        <${Configuration} job=${job} />
      </div>
    </div>`;
}

function Done({ job }) {
  return html`<div class="notice success">
    <p>
      The model <a href=${link(["model", job.fine_tuned_model])}>${job.fine_tuned_model}</a> is
      ready, trained on ${" "}${plural(job.trained_tokens ?? 0, "token")}.
    </p>
    <a class="button" href=${link(["playground"], { a: parentOf(job), b: job.fine_tuned_model })}>
      Try it beside its ${job.teacher ? "teacher" : "start model"}
    </a>
  </div>`;
}
