/** The form for a new job, with an estimate and the same request as curl and Python. */

import { html, useMemo, useRef, useState } from "../html.js";
import { allPages, call, idempotencyKey } from "../api.js";
import { useAction, useResource } from "../live.js";
import { go, route } from "../router.js";
import { Estimate } from "../parts/estimate.js";
import { bodyOf, EMPTY_FORM, JobFields } from "../parts/job_form.js";
import { Snippets } from "../parts/snippets.js";
import { TrainingFile } from "../parts/training_file.js";
import { ErrorNotice, PageHead, Section } from "../parts/ui.js";

/** Purposes of files that a job can train on. */
const PURPOSES = ["fine-tune", "distillation"];
const MAX_FILES = 500; // per purpose

/** Returns the files that a job can train on, the newest first. */
async function loadFiles() {
  const lists = await Promise.all(
    PURPOSES.map((purpose) => allPages("/v1/files", { purpose }, MAX_FILES)),
  );
  return lists.flat().sort((a, b) => b.created_at - a.created_at);
}

/** Returns the body of the request, or the error in the form. */
function parse(form, file) {
  try {
    return { body: bodyOf(form, file), error: null };
  } catch (error) {
    return { body: null, error };
  }
}

/** Keeps one idempotency key per body, so that a second click creates no second job. */
function useSubmit() {
  const sent = useRef({ text: "", key: "" });
  return useAction(async (body) => {
    const text = JSON.stringify(body);
    if (sent.current.text !== text) sent.current = { text, key: idempotencyKey() };
    const headers = { "idempotency-key": sent.current.key };
    const job = await call("/v1/fine_tuning/jobs", { method: "POST", json: body, headers });
    go(["job", job.id]);
  });
}

export default function NewJob() {
  const query = route.value.query;
  const [form, setForm] = useState({ ...EMPTY_FORM, teacher: query.get("teacher") ?? "" });
  const [file, setFile] = useState(query.get("file") ?? "");
  const models = useResource(() => call("/v1/models"), []);
  const files = useResource(loadFiles, []);
  const submit = useSubmit();
  const onUploaded = (created) => {
    files.set([created, ...(files.value ?? [])]);
    setFile(created.id);
  };
  const { body, error } = useMemo(() => parse(form, file), [form, file]);
  const isComplete = body !== null && Boolean(body.model && body.training_file);
  const shownFiles = files.value ?? [];
  const onSubmit = (event) => {
    event.preventDefault();
    submit.run(body);
  };
  return html`<${PageHead} title="New job" />
    <${ErrorNotice} error=${models.error ?? files.error} />
    <form class="columns" onSubmit=${onSubmit}>
      <div>
        <${TrainingFile}
          files=${shownFiles}
          chosen=${file}
          onChoose=${setFile}
          onUploaded=${onUploaded}
          model=${form.model || form.teacher}
        />
        <${Section} title="Training">
          <${JobFields}
            form=${form}
            setForm=${setForm}
            models=${models.value?.data ?? []}
            files=${shownFiles}
          />
        <//>
      </div>
      <div>
        <${Estimate} body=${isComplete ? body : null} />
        <${Section} title="Create">
          <${ErrorNotice} error=${error ?? submit.error} />
          <p class="muted">
            ${
              isComplete
                ? "The job begins when a train worker is free."
                : "Choose a training file and a model first."
            }
          </p>
          <button type="submit" class="primary" disabled=${!isComplete || submit.isBusy}>
            Create the job
          </button>
        <//>
        <${Section} title="The same request">
          ${
            body
              ? html`<${Snippets} body=${body} />`
              : html`<p class="muted">Correct the form to see it.</p>`
          }
        <//>
      </div>
    </form>`;
}
