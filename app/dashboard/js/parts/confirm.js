/** A dialog that asks before an action. It is a native modal dialog, so it keeps the focus. */

import { html, useEffect, useId, useRef } from "../html.js";
import { useAction } from "../live.js";
import { ErrorNotice } from "./ui.js";

/** `action` is the text of the button that calls `onConfirm`, whose error is shown in the dialog. */
export function Confirm({ title, text, action, isDanger, onConfirm, onClose }) {
  const dialog = useRef(null);
  const titleId = useId();
  const work = useAction(async () => {
    await onConfirm();
    onClose();
  });
  useEffect(() => {
    const opener = document.activeElement;
    dialog.current.showModal();
    return () => opener?.focus?.();
  }, []);
  return html`<dialog ref=${dialog} aria-labelledby=${titleId} onClose=${onClose}>
    <h2 id=${titleId}>${title}</h2>
    <p>${text}</p>
    <${ErrorNotice} error=${work.error} />
    <div class="actions end">
      <button type="button" onClick=${onClose}>Back</button>
      <button
        type="button"
        class=${isDanger ? "danger" : "primary"}
        disabled=${work.isBusy}
        onClick=${() => work.run()}
      >
        ${action}
      </button>
    </div>
  </dialog>`;
}
