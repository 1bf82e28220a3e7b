/** Numbers, sizes, durations and times as text. */

const DASH = "–";
const SIZE_UNITS = ["B", "kB", "MB", "GB", "TB"];
const COUNT_UNITS = ["", " k", " M", " B", " T"];

/** Returns a number with at most `digits` significant digits, or a dash if there is none. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return DASH;
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e9)) {
    return value.toExponential(Math.min(2, digits - 1));
  }
  return new Intl.NumberFormat("en", { maximumSignificantDigits: digits }).format(value);
}

/** Returns an integer with separators, or a dash. */
export function integer(value) {
  if (value === null || value === undefined) return DASH;
  return new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format(value);
}

export function percent(share, digits = 1) {
  if (share === null || share === undefined) return DASH;
  return `${(100 * share).toFixed(digits)} %`;
}

function scaled(value, units, suffixless) {
  if (value === null || value === undefined) return DASH;
  let unit = 0;
  let size = value;
  while (Math.abs(size) >= 999.5 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || Math.abs(size) >= 99.5 ? 0 : 1;
  return `${size.toFixed(digits)}${suffixless ? "" : " "}${units[unit]}`;
}

export function bytes(value) {
  return scaled(value, SIZE_UNITS, false);
}

/** Returns a large count in short form, such as "134.5 M". */
export function count(value) {
  return scaled(value, COUNT_UNITS, true);
}

/** Returns a duration in its two largest units, such as "2 h 5 min". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return DASH;
  if (seconds > 0 && seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const total = Math.round(seconds);
  if (total < 60) return `${total} s`;
  const units = [
    [86400, "d"],
    [3600, "h"],
    [60, "min"],
    [1, "s"],
  ];
  const first = units.findIndex(([size]) => total >= size);
  return units
    .slice(first, first + 2)
    .map(([size, name], i) => [
      Math.floor(i === 0 ? total / size : (total % units[first][0]) / size),
      name,
    ])
    .filter(([amount]) => amount > 0)
    .map(([amount, name]) => `${amount} ${name}`)
    .join(" ");
}

/** Returns how long ago a time was, such as "5 min ago". `seconds` is since the epoch. */
export function ago(seconds) {
  if (!seconds) return DASH;
  const age = Math.max(0, Date.now() / 1000 - seconds);
  if (age < 5) return "just now";
  if (age < 60) return `${Math.round(age)} s ago`;
  if (age > 7 * 86400) return date(seconds);
  return `${duration(age).split(" ").slice(0, 2).join(" ")} ago`;
}

/** Returns a date and time in local time. `seconds` is since the epoch. */
export function date(seconds) {
  if (!seconds) return DASH;
  const at = new Date(seconds * 1000);
  return new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" }).format(at);
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

/** Returns a name from the code as words: "generating_teacher_data" as "Generating teacher data". */
export function words(name) {
  if (!name) return DASH;
  const text = name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

/** Returns `1 row` or `2 rows`. */
export function plural(amount, noun) {
  return `${integer(amount)} ${noun}${amount === 1 ? "" : "s"}`;
}
