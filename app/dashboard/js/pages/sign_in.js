/** Sign-in with an API key. */

import { html, useEffect, useRef, useState } from "../html.js";
import { call, signIn, signOutReason, validateKey } from "../api.js";
import { useAction } from "../live.js";
import { ThemeToggle } from "../parts/theme_toggle.js";
import { ErrorNotice, Field } from "../parts/ui.js";

/** Checks the key with a cheap request. A key without this scope is a valid key, too. */
async function check(key) {
  validateKey(key);
  try {
    await call("/v1/fine_tuning/jobs?limit=1", { key });
  } catch (error) {
    if (error.status !== 403) throw error;
  }
  signIn(key);
}

export function SignIn() {
  const [text, setText] = useState("");
  const action = useAction(check);
  const input = useRef(null);
  useEffect(() => input.current.focus(), []);
  const submit = (event) => {
    event.preventDefault();
    action.run(text.trim());
  };
  const help = "The key is kept in this tab only, and sent to this service only.";
  return html`<main class="sign-in">
    <form class="card" onSubmit=${submit}>
      <div class="brand"><span class="brand-mark" aria-hidden="true"></span>Stillhouse</div>
      <h1>Sign in</h1>
      ${signOutReason.value && html`<p class="notice">You were signed out: ${signOutReason.value}</p>`}
      <${Field}
        label="API key"
        help=${help}
        control=${(ids) =>
          html`<input
            ...${ids}
            type="password"
            autocomplete="off"
            ref=${input}
            spellcheck="false"
            placeholder="sk-sh-…"
            required
            value=${text}
            onInput=${(event) => setText(event.currentTarget.value)}
          />`}
      />
      <${ErrorNotice} error=${action.error} />
      <button type="submit" class="primary" disabled=${action.isBusy || !text.trim()}>
        ${action.isBusy ? "Checking …" : "Sign in"}
      </button>
      <p class="muted">
        The service that <code>make up</code> starts writes a key to${" "}
        <code>.stillhouse/api_key</code>. <code>stillhouse keys create --project NAME</code> creates
        another one.
      </p>
      <${ThemeToggle} />
    </form>
  </main>`;
}
