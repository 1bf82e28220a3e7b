/** Saves a response as a file. A link cannot do this, because it would not send the API key. */

/**
 * Writes the response to a file that the user chooses, if the browser can stream to one. Other
 * browsers hold the file in memory first.
 * @param {Response} response @param {string} name
 */
export async function save(response, name) {
  if (window.showSaveFilePicker) {
    const file = await window.showSaveFilePicker({ suggestedName: name }).catch(() => null);
    if (file === null) {
      await response.body.cancel();
      return;
    }
    await response.body.pipeTo(await file.createWritable());
    return;
  }
  const url = URL.createObjectURL(await response.blob());
  const anchor = document.createElement("a");
  Object.assign(anchor, { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
