/**
 * Line chart over the steps of a job, drawn by uPlot. It is a figure with a caption, a cursor for
 * the keyboard, and a table of its data, because a screen reader cannot read the canvas.
 */

import uPlot from "../../vendor/uplot.js";
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../html.js";
import { integer, number } from "../format.js";
import { SeriesTable } from "./series_table.js";
import { shownTheme } from "./theme_toggle.js";
import { aligned, thinned } from "./thinning.js";

const HEIGHT = 190;
const AXIS_WIDTH = 54;
const DASHES = [[], [7, 4], [2, 3], [10, 4, 2, 4], [14, 4], [4, 2, 4, 6]];
const MIN_SELECTION = 6; // pixels; a shorter drag is a click
const FEW_POINTS = 60; // a series with fewer points shows a dot for each

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Returns the place of a series among the colours and dashes, which `style` may name. */
function styleOf(series, i) {
  return (series.style ?? i) % DASHES.length;
}

function seriesOptions(series, i) {
  const style = styleOf(series, i);
  const stroke = color(`--series-${style + 1}`);
  return {
    label: series.name,
    stroke,
    // Values of single steps are noisy, and must not hide those of the held-out rows.
    width: series.isNoisy ? 1.1 : 1.8,
    alpha: series.isNoisy ? 0.6 : 1,
    dash: DASHES[style],
    spanGaps: true,
    points: { show: series.points.length < FEW_POINTS, size: 5, fill: stroke, stroke },
  };
}

function options(series, width, format, handlers) {
  const axis = {
    stroke: color("--muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: color("--grid"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    scales: { x: { time: false } },
    cursor: {
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => handlers.onZoom(null) },
      points: { size: 7 },
    },
    hooks: {
      setCursor: [(plot) => handlers.onCursor(plot.cursor.idx ?? null)],
      setSelect: [
        (plot) => {
          const { left, width: selected } = plot.select;
          if (selected < MIN_SELECTION) return;
          const range = [plot.posToVal(left, "x"), plot.posToVal(left + selected, "x")];
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          handlers.onZoom(range);
        },
      ],
    },
    axes: [
      { ...axis, size: 28, values: (_, steps) => steps.map((step) => integer(step)) },
      { ...axis, size: AXIS_WIDTH, values: (_, values) => values.map((value) => format(value)) },
    ],
    series: [{}, ...series.map(seriesOptions)],
  };
}

/** Returns the last value at or before a place, because not every series has all steps. */
function valueAt(column, index) {
  for (let i = index; i >= 0; i -= 1) if (column[i] !== null) return column[i];
  return null;
}

function sentence(data, index, series, format) {
  const values = series
    .map((one, i) => [one.name, valueAt(data[i + 1], index)])
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name} ${format(value)}`);
  return `Step ${integer(data[0][index])}: ${values.join(", ")}`;
}

/** Creates the plot, keeps its size and theme, and gives it new data once per frame. */
function usePlot(holder, series, data, range, format, handlers) {
  const plot = useRef(null);
  const latest = useRef({});
  latest.current = { data, range };
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(holder.current);
    return () => observer.disconnect();
  }, []);
  const shape = series.map((one) => `${one.name}:${one.points.length < FEW_POINTS}`).join("|");
  useEffect(() => {
    if (width === 0) return undefined;
    plot.current = new uPlot(options(series, width, format, handlers), data, holder.current);
    show(plot.current, latest.current);
    return () => {
      plot.current.destroy();
      plot.current = null;
    };
  }, [width, shape, shownTheme.value]);
  useEffect(() => {
    const frame = requestAnimationFrame(() => {
      if (plot.current !== null) show(plot.current, latest.current);
    });
    return () => cancelAnimationFrame(frame);
  }, [data, range]);
  return { plot, width };
}

function show(plot, { data, range }) {
  plot.setData(data, range === null);
  if (range !== null) plot.setScale("x", { min: range[0], max: range[1] });
}

function Legend({ series, data, index, format }) {
  return html`<ul class="legend">
    ${series.map((one, i) => {
      const column = data[i + 1];
      const value = valueAt(column, index ?? column.length - 1);
      return html`<li key=${one.name}>
        <svg class="swatch" viewBox="0 0 22 4" aria-hidden="true">
          <line
            x1="0"
            y1="2"
            x2="22"
            y2="2"
            data-series=${styleOf(one, i) + 1}
            stroke-dasharray=${DASHES[styleOf(one, i)].join(" ")}
          />
        </svg>
        ${one.name} <strong>${value === null ? "" : format(value)}</strong>
      </li>`;
    })}
  </ul>`;
}

/** Moves the cursor of a chart by the arrow keys. Returns the new place, or null to hide it. */
function placeAfter(key, index, last) {
  const from = index ?? (key === "ArrowRight" ? -1 : last + 1);
  const places = {
    ArrowLeft: from - 1,
    ArrowRight: from + 1,
    PageUp: from + 10,
    PageDown: from - 10,
    Home: 0,
    End: last,
  };
  return key in places ? Math.max(0, Math.min(last, places[key])) : undefined;
}

/**
 * `series` is a list of `{name, points, style, isNoisy}`, where a point is `{step, value}`.
 * `format` returns a value as text.
 */
export function Chart({ title, note, series, format = number }) {
  const holder = useRef(null);
  const [range, setRange] = useState(null);
  const [index, setIndex] = useState(null);
  const numPixels = useRef(600);
  const data = useMemo(
    () => aligned(series.map((one) => thinned(one.points, numPixels.current, range))),
    [series, range],
  );
  const handlers = { onCursor: setIndex, onZoom: setRange };
  const { plot, width } = usePlot(holder, series, data, range, format, handlers);
  if (width > 0) numPixels.current = Math.max(50, width - AXIS_WIDTH);
  const last = data[0].length - 1;
  const shown = index === null ? null : Math.min(index, last);
  const onKeyDown = (event) => {
    const place = placeAfter(event.key, shown, last);
    if (place === undefined || plot.current === null || last < 0) return;
    event.preventDefault();
    const left = plot.current.valToPos(data[0][place], "x");
    plot.current.setCursor({ left, top: HEIGHT / 3 });
    setIndex(place);
  };
  const onBlur = () => {
    plot.current?.setCursor({ left: -10, top: -10 });
    setIndex(null);
  };
  const text = last < 0 ? "No values yet" : sentence(data, shown ?? last, series, format);
  return html`<figure class="chart">
    <figcaption>
      <span class="chart-title">${title}</span>
      ${note && html`<span class="muted"> ${note}</span>`}
    </figcaption>
    <${Legend} series=${series} data=${data} index=${shown} format=${format} />
    <div
      class="plot"
      ref=${holder}
      tabindex="0"
      role="slider"
      aria-label=${`${title}: read the values with the arrow keys`}
      aria-valuemin="0"
      aria-valuemax=${Math.max(0, last)}
      aria-valuenow=${Math.max(0, shown ?? last)}
      aria-valuetext=${text}
      onKeyDown=${onKeyDown}
      onBlur=${onBlur}
    ></div>
    <div class="chart-foot">
      <span class="muted"
        >${shown === null ? "Steps. Drag to zoom in." : `Step ${integer(data[0][shown])}`}</span
      >
      ${
        range !== null &&
        html`<button type="button" class="small" onClick=${() => setRange(null)}>
          Show all steps
        </button>`
      }
    </div>
    <${SeriesTable} title=${title} series=${series} format=${format} />
  </figure>`;
}
