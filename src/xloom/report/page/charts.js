// Charts: each is drawn by Plotly from a function, so that it can be drawn again in other colours or for print.

const charts = new Map(); // figure -> what draws it

function chart(id, { make, numbers, height = 260 }) {
  const figure = byId(`chart-${id}`);
  if (!figure) return;
  const plot = figure.querySelector(".plot");
  const title = figure.querySelector("figcaption").textContent.trim();
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `Chart: ${title.replace(/\s+/g, " ")} The table below has its numbers.`);
  if (numbers) figure.querySelector(".scroll").replaceChildren(numbers);
  charts.set(figure, () => draw(figure, plot, make, height));
  charts.get(figure)();
}

function draw(figure, plot, make, height) {
  const { traces, layout = {} } = make();
  const axis = (own = {}) => ({
    automargin: true, gridcolor: lines(), linecolor: lines(), zerolinecolor: muted(), fixedrange: true, ...own,
    title: { standoff: 10, ...own.title, font: { size: 12, color: muted() } },
  });
  const width = printing ? (figure.classList.contains("wide") ? 690 : 330) : plot.clientWidth;
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height, width,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink() },
    margin: { l: 8, r: 20, t: 12, b: 8 }, showlegend: false, dragmode: false,
    hoverlabel: { bgcolor: isDark() ? "#2a3138" : "#ffffff", bordercolor: muted(), font: { color: ink() } },
    ...layout, xaxis: axis({ ...layout.xaxis, ...(layout.xaxis?.nticks ? { nticks: Math.ceil(width / 60), tickangle: 0 } : {}) }), yaxis: axis(layout.yaxis),
  };
  Plotly.react(plot, traces, whole, { displayModeBar: false, doubleClick: false });
}

const redraw = () => charts.forEach((drawn) => drawn());

// Plotly reads a little HTML and %{...} in words; names of experts and groups are to be words only.
const escaped = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "% {");

// --- kinds of charts ---

const marker = (column) => ({
  color: data.looks[column].colour,
  pattern: { shape: data.looks[column].pattern, fgcolor: isDark() ? "#14171b" : "#ffffff", fillmode: "overlay", size: 6 },
});

// rows across, columns down: layers run as the text of a model does
function heat(numbers, { xtitle = "", colours = ramp, words = percent, labels = false, ticks = ".0%" }) {
  const z = numbers.columns.map((_, column) => numbers.values.map((row) => row[column]));
  const found = z.flat().filter((x) => x != null).map(Math.abs);
  const highest = Math.max(...found, 1e-9);
  const small = highest <= 0.1;
  const step = small ? 0.01 : 0.1; // the scale ends at a round share
  const top = words === percent ? step * Math.ceil(highest / step) : highest;
  const text = z.map((row) => row.map((x) => (x == null ? "" : words(x, labels && !small ? 0 : 1))));
  const even = colours === balance;
  return {
    traces: [{
      type: "heatmap", z, x: numbers.rows, y: numbers.columns, text, zmin: even ? -top : 0, zmax: top, xgap: 1, ygap: 1,
      colorscale: scale(colours()), hoverongaps: false, texttemplate: labels ? "%{text}" : "",
      hovertemplate: `${xtitle} %{x}, %{y}: %{text}<extra></extra>`,
      colorbar: { thickness: 10, outlinewidth: 0, len: 1, tickformat: words === percent && small ? ".1%" : ticks, nticks: 4, tickfont: { color: muted() }, x: 1.01 },
    }],
    layout: {
      xaxis: {
        title: { text: xtitle }, type: "category", showgrid: false, ...(labels ? { tickfont: { size: 11 } } : {}),
        ...(numbers.rows.length > 16 ? { nticks: 16 } : {}),
      },
      yaxis: { autorange: "reversed", type: "category", showgrid: false },
    },
  };
}

// a dot and its interval in every row
function dots(names, values, lows, highs, { xtitle, words, colour }) {
  return {
    traces: [{
      type: "scatter", mode: "markers", x: values, y: names, marker: { size: 10, color: names.map((_, n) => colour(n)) },
      error_x: lows ? {
        type: "data", symmetric: false, array: highs.map((x, n) => x - values[n]), arrayminus: lows.map((x, n) => values[n] - x),
        color: muted(), thickness: 1.5, width: 4,
      } : undefined,
      text: values.map((x, n) => `${words(x)}${lows ? ` (${words(lows[n])} to ${words(highs[n])})` : ""}`),
      hovertemplate: "%{y}: %{text}<extra></extra>",
    }],
    layout: {
      xaxis: { title: { text: xtitle }, zeroline: true, zerolinewidth: 1.5 },
      yaxis: { autorange: "reversed", type: "category", griddash: "dot" },
    },
  };
}

function bars(numbers) {
  const names = numbers.columns;
  const [shares, leads] = numbers.values;
  return {
    traces: [
      ...names.map((name, column) => ({
        type: "bar", orientation: "h", y: [name], x: [shares[column]], marker: marker(column), hovertemplate: "%{y}: mean share %{x:.1%}<extra></extra>",
      })),
      { type: "scatter", mode: "markers", y: names, x: leads, marker: { symbol: "diamond", size: 9, color: ink(), line: { color: isDark() ? "#14171b" : "#ffffff", width: 1.5 } },
        hovertemplate: "%{y} leads %{x:.1%} of tokens and sites<extra></extra>" },
    ],
    layout: {
      barmode: "overlay", bargap: 0.35, xaxis: { tickformat: ".0%", rangemode: "tozero", range: [0, 1.05 * Math.max(...shares, ...leads)] },
      yaxis: { autorange: "reversed", type: "category", showgrid: false, tickvals: names, ticktext: names.map((name, n) => `${name}  <b>${percent(shares[n])}</b>`.replace(name, escaped(name))) },
    },
  };
}

function stackedBars(numbers) {
  return {
    traces: numbers.columns.map((name, column) => ({
      type: "bar", orientation: "h", name, y: numbers.rows, x: numbers.values.map((row) => row[column]), marker: marker(column),
      hovertemplate: `%{y}: ${escaped(name)} %{x:.1%}<extra></extra>`,
    })),
    layout: {
      barmode: "stack", bargap: 0.25, xaxis: { tickformat: ".0%", range: [0, 1] },
      yaxis: { autorange: "reversed", type: "category", showgrid: false },
    },
  };
}
