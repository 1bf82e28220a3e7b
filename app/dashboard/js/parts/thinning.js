/** Thins long series to about two points per pixel, without losing their peaks. */

/**
 * Returns the points in the range, at most about two per bucket: its minimum and its maximum.
 * @param {{step: number, value: number}[]} points - ordered by step
 * @param {number} numBuckets - the width of the plot in pixels
 * @param {[number, number]|null} range - first and last step; null: all
 */
export function thinned(points, numBuckets, range = null) {
  const [first, last] = range ?? [points[0]?.step, points.at(-1)?.step];
  const inside = range ? around(points, first, last) : points;
  if (inside.length <= 2 * numBuckets || last <= first) return inside;
  const kept = [inside[0]];
  const width = (last - first) / numBuckets;
  let begin = 0;
  for (let bucket = 0; bucket < numBuckets; bucket += 1) {
    const end = first + width * (bucket + 1);
    let low = null;
    let high = null;
    let i = begin;
    while (i < inside.length && (inside[i].step < end || bucket === numBuckets - 1)) {
      if (low === null || inside[i].value < inside[low].value) low = i;
      if (high === null || inside[i].value > inside[high].value) high = i;
      i += 1;
    }
    begin = i;
    if (low !== null) {
      for (const place of new Set([Math.min(low, high), Math.max(low, high)])) {
        if (inside[place] !== kept.at(-1)) kept.push(inside[place]);
      }
    }
  }
  if (kept.at(-1) !== inside.at(-1)) kept.push(inside.at(-1));
  return kept;
}

/** Returns the points in the range, and one on each side so that the line reaches the edges. */
function around(points, first, last) {
  const begin = points.findIndex((point) => point.step >= first);
  if (begin < 0) return points.slice(-1);
  const end = points.findIndex((point) => point.step > last);
  return points.slice(Math.max(0, begin - 1), end < 0 ? points.length : end + 1);
}

/**
 * Returns columns for uPlot: all steps in order, and per series its value or null at each step.
 * @param {{step: number, value: number}[][]} series
 */
export function aligned(series) {
  const steps = [...new Set(series.flatMap((points) => points.map((point) => point.step)))];
  steps.sort((a, b) => a - b);
  const columns = series.map((points) => {
    const values = new Map(points.map((point) => [point.step, point.value]));
    return steps.map((step) => values.get(step) ?? null);
  });
  return [steps, ...columns];
}
