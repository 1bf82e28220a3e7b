/** Downloads a file of the API. A link cannot do this, because it would not send the API key. */

import { ApiError, request } from "../api.js";

/**
 * Writes the response to a file that the user chooses, if the browser can stream to one. Other
 * browsers hold the file in memory first. Throws ApiError if the download fails, and AbortError if
 * the user chooses no file.
 * @param {string} path - path of the request
 * @param {string} name - suggested name of the file
 */
export async function save(path, name) {
  // The browser opens its dialog only just after the click, so the request must come second.
  const file = await window.showSaveFilePicker?.({ suggestedName: name });
  const response = await request(path);
  try {
    if (file) await response.body.pipeTo(await file.createWritable());
    else offer(await response.blob(), name);
  } catch (error) {
    throw new ApiError(`${name} could not be downloaded: ${error.message}. Try again.`, 0);
  }
}

function offer(blob, name) {
  const url = URL.createObjectURL(blob);
  const anchor = document.createElement("a");
  Object.assign(anchor, { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
