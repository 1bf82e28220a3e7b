/** The address of the page after `#`, such as `#/jobs/ftjob-1`, as a signal. */

import { signal } from "./html.js";

function read() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  return { parts, query: new URLSearchParams(query) };
}

/** The current route: the decoded parts of its path, and its query. */
export const route = signal(read());

addEventListener("hashchange", () => {
  route.value = read();
});

/** Returns the link to a page from the parts of its path and its query. */
export function link(parts, query = {}) {
  const path = parts.map(encodeURIComponent).join("/");
  const text = new URLSearchParams(query).toString();
  return `#/${path}${text ? `?${text}` : ""}`;
}

export function go(parts, query) {
  location.hash = link(parts, query);
}

/** Changes the query of the present page without a new entry in the history. */
export function replaceQuery(query) {
  history.replaceState(null, "", link(route.value.parts, query));
}
