/** Playground: two models answer the same prompt side by side, streamed, with their speeds. */

import { html, useEffect, useRef, useState } from "../html.js";
import { ApiError, call, eventsOf, request } from "../api.js";
import { integer, number } from "../format.js";
import { useResource } from "../live.js";
import { replaceQuery, route } from "../router.js";
import { SelectField, TextArea, TextField } from "../parts/fields.js";
import { announce, Empty, ErrorNotice, Loading, PageHead } from "../parts/ui.js";

const SIDES = ["a", "b"];
const EMPTY = { text: "", error: null, isRunning: false, isStopped: false, stats: null };

/** Returns the listed model with this id or alias, or the model that a checkpoint belongs to. */
function listedModel(models, id) {
  const name = id.replace(/:ckpt-step-[0-9]+$/, "");
  return models.find((one) => one.id === name || one.aliases.includes(name));
}

/** Returns the route and the body of a request: only chats use the chat template. */
function requestOf(isChat, id, prompt, options) {
  const common = {
    model: id,
    max_tokens: options.maxTokens,
    temperature: options.temperature,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!isChat) return ["/v1/completions", { ...common, prompt }];
  const system = options.system ? [{ role: "system", content: options.system }] : [];
  return [
    "/v1/chat/completions",
    { ...common, messages: [...system, { role: "user", content: prompt }] },
  ];
}

/**
 * Streams one answer: a chat if the model has a chat template, else a completion. A checkpoint of a
 * job that still runs is not in the list of models. For it, the error of a chat decides.
 */
async function answerOf(model, id, prompt, options, abort, onChange) {
  const send = (isChat) => stream(requestOf(isChat, id, prompt, options), abort, onChange);
  if (model && !model.has_chat_template) return send(false);
  try {
    return await send(true);
  } catch (error) {
    if (error.code !== "no_chat_template") throw error;
    return send(false);
  }
}

/** Streams one answer. `onChange` gets the text and the figures so far. */
async function stream([path, json], abort, onChange) {
  const began = performance.now();
  const response = await request(path, { method: "POST", json, signal: abort });
  let text = "";
  let first = null;
  let numChunks = 0;
  let usage = null;
  let reason = null;
  for await (const chunk of eventsOf(response)) {
    if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    if (piece) {
      first ??= performance.now();
      numChunks += 1;
      text += piece;
    }
    usage = chunk.usage ?? usage;
    reason = choice?.finish_reason ?? reason;
    const now = performance.now();
    const numTokens = usage?.completion_tokens ?? numChunks;
    const seconds = first === null ? 0 : (now - first) / 1000;
    onChange(text, {
      numTokens,
      firstMs: first === null ? null : first - began,
      speed: seconds > 0 && numTokens > 1 ? (numTokens - 1) / seconds : null,
      reason,
    });
  }
}

function Stats({ stats, isStopped }) {
  if (stats === null) {
    const text = isStopped ? "Stopped" : "The speed is shown here.";
    return html`<p class="answer-stats muted">${text}</p>`;
  }
  const { numTokens, firstMs, speed, reason } = stats;
  const parts = [`${integer(numTokens)} tokens`];
  if (speed !== null) parts.unshift(`${number(speed, 3)} tokens/s`);
  if (firstMs !== null) parts.push(`first after ${integer(firstMs)} ms`);
  if (reason === "length") parts.push("ended at the token limit");
  if (isStopped) parts.push("stopped");
  return html`<p class="answer-stats">${parts.join(" · ")}</p>`;
}

/** Returns the texts of the choice of a model: models, aliases, and a checkpoint in the address. */
function modelNames(models, chosen) {
  const ids = [...models.map((model) => model.id), ...models.flatMap((model) => model.aliases)];
  if (chosen && !ids.includes(chosen)) ids.unshift(chosen);
  return Object.fromEntries(ids.map((id) => [id, id]));
}

function Answer({ side, models, chosen, onChoose, state }) {
  const title = side === "a" ? "First model" : "Second model";
  const note = state.isRunning ? "Waiting for the first token …" : "No answer yet";
  return html`<section class="card" aria-label=${title}>
    <${SelectField}
      label=${title}
      first="No model"
      options=${modelNames(models, chosen)}
      value=${chosen}
      onChange=${onChoose}
    />
    <div
      class="answer-box"
      tabindex="0"
      role="region"
      aria-label=${`Answer of the ${title.toLowerCase()}`}
      aria-busy=${state.isRunning ? "true" : "false"}
    >
      <p class="answer">${state.text || html`<span class="muted">${note}</span>`}</p>
    </div>
    <${ErrorNotice} error=${state.error} />
    <${Stats} stats=${state.stats} isStopped=${state.isStopped} />
  </section>`;
}

function Options({ options, setOptions }) {
  const bind = (name, parse) => ({
    value: options[name],
    onChange: (text) => setOptions({ ...options, [name]: parse(text) }),
  });
  return html`<details>
    <summary>Options</summary>
    <div class="fields">
      <${TextField}
        label="Tokens at most"
        type="number"
        min="1"
        max="4096"
        ...${bind("maxTokens", Number)}
      />
      <${TextField}
        label="Temperature"
        help="0 always takes the most likely token."
        type="number"
        min="0"
        max="2"
        step="0.1"
        ...${bind("temperature", Number)}
      />
      <${TextField} label="System message" isWide=${true} ...${bind("system", String)} />
    </div>
  </details>`;
}

/**
 * Runs both models at once. Returns their states, and functions that start and stop them. Leaving
 * the page stops them, too.
 */
function useAnswers(models, chosen) {
  const [states, setStates] = useState({ a: EMPTY, b: EMPTY });
  const running = useRef(null); // the AbortController of the newest requests
  useEffect(() => () => running.current?.abort(), []);
  const answer = async (side, prompt, options, abort) => {
    // A request that was aborted must not change the state of the one that followed it.
    const update = (changes) => {
      if (abort.aborted) return;
      setStates((old) => ({ ...old, [side]: { ...old[side], ...changes } }));
    };
    const id = chosen[side];
    const onChange = (text, stats) => update({ text, stats });
    try {
      await answerOf(listedModel(models, id), id, prompt, options, abort, onChange);
      update({ isRunning: false });
    } catch (error) {
      update({ error, isRunning: false });
    }
  };
  const start = async (prompt, options) => {
    running.current?.abort();
    const requests = new AbortController();
    running.current = requests;
    announce("The models are answering");
    const sides = SIDES.filter((side) => chosen[side]);
    const isRunning = (side) => sides.includes(side);
    setStates({
      a: { ...EMPTY, isRunning: isRunning("a") },
      b: { ...EMPTY, isRunning: isRunning("b") },
    });
    await Promise.all(sides.map((side) => answer(side, prompt, options, requests.signal)));
    if (!requests.signal.aborted) announce("The answers are complete");
  };
  const stop = () => {
    running.current?.abort();
    const stopped = (state) =>
      state.isRunning ? { ...state, isRunning: false, isStopped: true } : state;
    setStates((old) => ({ a: stopped(old.a), b: stopped(old.b) }));
    announce("Stopped");
  };
  return { states, start, stop, isRunning: states.a.isRunning || states.b.isRunning };
}

export default function Playground() {
  const query = route.value.query;
  const list = useResource(() => call("/v1/models"), []);
  const models = (list.value?.data ?? []).filter((model) => model.family !== "masked");
  const [picked, setPicked] = useState({ a: query.get("a"), b: query.get("b") });
  const chosen = { a: picked.a ?? models[0]?.id ?? "", b: picked.b ?? models[1]?.id ?? "" };
  const [prompt, setPrompt] = useState("");
  const [options, setOptions] = useState({ maxTokens: 128, temperature: 0, system: "" });
  const { states, start, stop, isRunning } = useAnswers(models, chosen);
  const choose = (side) => (id) => {
    const next = { ...chosen, [side]: id };
    setPicked(next);
    replaceQuery(next);
  };
  const canSend = !isRunning && prompt.trim() !== "" && Boolean(chosen.a || chosen.b);
  const submit = (event) => {
    event.preventDefault();
    if (canSend) start(prompt, options);
  };
  const onKeyDown = (event) => {
    const isSend = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    // The form checks the options first, and then calls `submit`.
    if (isSend && !event.repeat && canSend) event.currentTarget.form.requestSubmit();
  };
  if (list.value && models.length === 0) {
    return html`<${PageHead} title="Playground" />
      <${Empty} title="No model can answer yet"
        ><p>Import one first: see <a href="#/models">Models</a>.</p><//
      >`;
  }
  return html`<${PageHead} title="Playground" />
    <${ErrorNotice} error=${list.error} onRetry=${list.reload} />
    ${list.isLoading && html`<${Loading} what="Loading models" />`}
    <form class="card" onSubmit=${submit}>
      <${TextArea}
        label="Prompt"
        help="Ctrl+Enter sends it to both models."
        rows="3"
        required
        onKeyDown=${onKeyDown}
        value=${prompt}
        onChange=${setPrompt}
      />
      <${Options} options=${options} setOptions=${setOptions} />
      <div class="actions">
        <button type="submit" class="primary" disabled=${!canSend}>Send to both models</button>
        <button type="button" disabled=${!isRunning} onClick=${stop}>Stop</button>
      </div>
    </form>
    <div class="pair">
      ${SIDES.map(
        (side) =>
          html`<${Answer}
            key=${side}
            side=${side}
            models=${models}
            chosen=${chosen[side]}
            onChoose=${choose(side)}
            state=${states[side]}
          />`,
      )}
    </div>`;
}
