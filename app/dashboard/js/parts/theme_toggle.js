/** The choice between the light theme, the dark theme and that of the system. */

import { html, signal } from "../html.js";
import { Icon } from "./ui.js";

const CHOICES = ["system", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");

const chosen = signal(localStorage.getItem("theme") ?? "system");

/** The theme that is shown. Charts are drawn again when it changes. */
export const shownTheme = signal(document.documentElement.dataset.theme);

function apply() {
  const systemTheme = system.matches ? "dark" : "light";
  const theme = chosen.value === "system" ? systemTheme : chosen.value;
  document.documentElement.dataset.theme = theme;
  shownTheme.value = theme;
}

system.addEventListener("change", apply);

function choose(theme) {
  chosen.value = theme;
  if (theme === "system") localStorage.removeItem("theme");
  else localStorage.setItem("theme", theme);
  apply();
}

export function ThemeToggle() {
  const next = CHOICES[(CHOICES.indexOf(chosen.value) + 1) % CHOICES.length];
  return html`<button
    type="button"
    class="quiet"
    title=${`Switch to the ${next} theme`}
    onClick=${() => choose(next)}
  >
    <${Icon} name="theme" /><span>Theme: ${chosen.value}</span>
  </button>`;
}
