/** Constants and functions for jobs that several pages use. */

export const STATUSES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"];
export const ACTIVE = new Set(["validating_files", "queued", "running"]);
export const MAX_COMPARED = 6; // as many as there are colours and dashes for series
export const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** Returns the displayed name of a job: its model, its suffix, or its start model. */
export function nameOf(job) {
  return job.fine_tuned_model ?? job.user_provided_suffix ?? job.model;
}

/** Returns the model that the job's model is compared with: its teacher, or its start model. */
export function parentOf(job) {
  return job.teacher ?? job.model;
}

/** Returns the estimated seconds to the end of a running job, or null. */
export function remainingSeconds(job) {
  if (job.estimated_finish === null) return null;
  return Math.max(0, job.estimated_finish - Date.now() / 1000);
}

/** Returns metrics as a map from the name of each series to its points. */
export function seriesByName(metrics) {
  return new Map(metrics.data.map((series) => [series.name, series.points]));
}

/** Returns the points with a new one. It replaces the point of the same step after a resume. */
export function withPoint(points, step, value) {
  const last = points.at(-1);
  if (last === undefined || last.step < step) return [...points, { step, value }];
  const others = points.filter((point) => point.step !== step);
  return [...others, { step, value }].sort((a, b) => a.step - b.step);
}
