// The overview: statistics of all texts, for one class of their tokens.

const CLASSES = { all: "all", prompt: "of the prompts", answer: "of the answers", special: "special ones" };

function setUpOverview() {
  const select = byId("class");
  for (const name of Object.keys(CLASSES).filter((name) => name in data.classes)) {
    select.append(el("option", { value: name }, CLASSES[name]));
  }
  select.addEventListener("change", () => showOverview(select.value));
}

function showOverview(name) {
  const found = data.classes[name];
  const rows = data.columns.length;
  showCards(found);
  chart("share", { make: () => bars(found.share), numbers: asTable(found.share, ""), height: Math.max(200, 60 + 30 * rows) });
  chart("layer", {
    make: () => heat(found.layer, { xtitle: "layer" }), numbers: asTable(found.layer, "layer"), height: 90 + 26 * rows,
  });
  chart("kind", {
    make: () => heat(found.kind, { xtitle: "", labels: true }), numbers: asTable(found.kind, "module"), height: 110 + 26 * rows,
  });
  chart("depth", { make: () => depthLines(found.depth), numbers: asTable(found.depth, "layer", (x) => x.toFixed(2)), height: Math.max(200, 60 + 30 * rows) });
  chart("couse", {
    make: () => heat(pairs(found.couse), { labels: true }), numbers: asTable(found.couse, ""), height: 110 + 26 * rows,
  });
  if (data.groups) chart("groups", { make: () => stackedBars(data.groups), numbers: asTable(data.groups, "group"), height: 60 + 30 * data.groups.rows.length });
}

function showCards(found) {
  const shares = found.share.values[0];
  const most = shares.indexOf(Math.max(...shares));
  const experts = data.columns.filter((name) => name !== "base").length;
  const cards = [
    [found.tokens.toLocaleString("en"), `tokens of ${count(data.texts.filter((text) => !text.model).length, "text")}`],
    [`${data.columns[most]} ${percent(shares[most])}`, "has the largest share of the mixing"],
    [found.acting.toFixed(1), `of ${count(experts, "expert")}${data.columns.length > experts ? " and the base" : ""} act at one token and site (effective number)`],
    [found.used.toFixed(1), "of them are used over all tokens and sites"],
  ];
  byId("cards").replaceChildren(...cards.map(([large, small]) => el("li", {}, el("b", {}, large), el("span", {}, small))));
}

// Each pair once, both ways together; an expert with itself says how alone it acts, and would outshine the pairs.
function pairs(numbers) {
  const values = numbers.values.map((row, r) => row.map((x, c) => (c > r ? 2 * x : null)));
  return { rows: numbers.rows.slice(0, -1), columns: numbers.columns.slice(1), values: values.slice(0, -1).map((row) => row.slice(1)) };
}

function depthLines(numbers) {
  const line = (column, colour, dash, symbol) => ({
    type: "scatter", mode: "lines+markers", name: numbers.columns[column], x: numbers.rows, y: numbers.values.map((row) => row[column]),
    line: { color: colour, dash, width: 2 }, marker: { symbol, size: 6 }, hovertemplate: "layer %{x}: %{y:.2f}<extra></extra>",
  });
  return {
    traces: [line(1, "#0072B2", "solid", "circle"), line(2, "#E69F00", "dash", "square")],
    layout: {
      showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      xaxis: { title: { text: "layer" }, type: "category", showgrid: false, ...(numbers.rows.length > 16 ? { nticks: 16 } : {}) },
      yaxis: { rangemode: "tozero", title: { text: "experts" } },
    },
  };
}
