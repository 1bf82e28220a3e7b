/** The address of the page after `#`, such as `#/jobs/ftjob-1`, as a signal. */

import { signal } from "./html.js";

let numVisits = 0;

/** Returns the decoded text, or the text itself if it is not valid, such as `%`. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function read() {
  const [path, ...query] = location.hash.replace(/^#/, "").split("?");
  numVisits += 1;
  return {
    parts: path.split("/").filter(Boolean).map(decoded),
    query: new URLSearchParams(query.join("?")),
    visit: numVisits,
  };
}

/**
 * The current route: the decoded parts of its path, its query, and the number of the visit. Each
 * visit has its own number, so that a page opens anew when only its query differs.
 */
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
