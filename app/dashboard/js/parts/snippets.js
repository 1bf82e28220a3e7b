/** The same request as a curl command and as Python. */

import { html } from "../html.js";
import { Code } from "./ui.js";

/** Returns JSON values as Python literals. */
function python(value, indent) {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((one) => python(one, inner)).join(", ")}]`;
  const lines = Object.entries(value).map(
    ([name, one]) => `${inner}${JSON.stringify(name)}: ${python(one, inner)},\n`,
  );
  return lines.length ? `{\n${lines.join("")}${indent}}` : "{}";
}

export function pythonOf(body) {
  const fields = Object.entries(body).map(
    ([name, value]) => `    ${name}=${python(value, "    ")},\n`,
  );
  return `import os
import openai

client = openai.OpenAI(
    base_url="${location.origin}/v1", api_key=os.environ["STILLHOUSE_API_KEY"]
)
job = client.fine_tuning.jobs.create(
${fields.join("")})
print(job.id)`;
}

export function curlOf(body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -s ${location.origin}/v1/fine_tuning/jobs \\
  -H "Authorization: Bearer $STILLHOUSE_API_KEY" \\
  -H "Content-Type: application/json" -d '${json}'`;
}

export function Snippets({ body }) {
  return html`<${Code} label="curl" text=${curlOf(body)} /><${Code}
      label="Python"
      text=${pythonOf(body)}
    />`;
}
