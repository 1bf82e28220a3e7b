/** The charts of the metrics of a job, or of the same metric of several jobs. */

import { html, useMemo } from "../html.js";
import { number, percent, words } from "../format.js";
import { Chart } from "./chart.js";

const asPercent = (value) => percent(value);

/** Charts in the order of the page, with the names of their series. */
export const GROUPS = [
  {
    title: "Loss",
    note: "per token, lower is better",
    names: { train_loss: "Training", valid_loss: "Held-out" },
  },
  {
    title: "KL to the teacher",
    note: "nats per token, lower is better",
    names: { train_kl: "Training", valid_kl: "Held-out" },
  },
  {
    title: "Agreement with the teacher",
    note: "share of tokens, higher is better",
    names: { train_agreement: "Training", valid_agreement: "Held-out" },
    format: asPercent,
  },
  {
    title: "Token accuracy",
    note: "share of tokens, higher is better",
    names: {
      train_mean_token_accuracy: "Training",
      valid_mean_token_accuracy: "Held-out",
    },
    format: asPercent,
  },
  {
    title: "Throughput",
    note: "training tokens per second",
    names: { tokens_per_second: "Tokens/s" },
  },
  { title: "Perplexity", note: "lower is better", names: { valid_perplexity: "Held-out" } },
  { title: "Learning rate", names: { learning_rate: "Learning rate" } },
  { title: "Gradient norm", names: { grad_norm: "Gradient norm" } },
];
const NUM_MAIN_GROUPS = 5;
const KNOWN = new Set(GROUPS.flatMap((group) => Object.keys(group.names)));

/** Shows the curves of one job. `metrics` maps names of series to points. */
export function Curves({ metrics }) {
  const groups = useMemo(() => {
    const known = GROUPS.map((group) => ({
      ...group,
      series: Object.entries(group.names)
        .filter(([name]) => metrics.has(name))
        .map(([name, label]) => ({
          name: label,
          points: metrics.get(name),
          isNoisy: name.startsWith("train_"),
        })),
    }));
    const others = [...metrics.keys()]
      .filter((name) => !KNOWN.has(name))
      .map((name) => ({
        title: words(name),
        series: [{ name: words(name), points: metrics.get(name) }],
      }));
    return {
      main: filled(known.slice(0, NUM_MAIN_GROUPS)),
      more: filled([...known.slice(NUM_MAIN_GROUPS), ...others]),
    };
  }, [metrics]);
  return html`<div class="charts">
      ${groups.main.map((group) => html`<${GroupChart} key=${group.title} group=${group} />`)}
    </div>
    ${
      groups.more.length > 0 &&
      html`<details class="more">
        <summary>More curves (${groups.more.length})</summary>
        <div class="charts">
          ${groups.more.map((group) => html`<${GroupChart} key=${group.title} group=${group} />`)}
        </div>
      </details>`
    }`;
}

function filled(groups) {
  return groups.filter((group) => group.series.length > 0);
}

export function GroupChart({ group }) {
  return html`<${Chart}
    title=${group.title}
    note=${group.note}
    series=${group.series}
    format=${group.format ?? number}
  />`;
}
