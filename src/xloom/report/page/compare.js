// Two texts, or one text under two models, side by side.

function setUpCompare() {
  const [left, right] = [byId("left"), byId("right")];
  fillSelect(left, () => true);
  fillSelect(right, () => true);
  const second = data.texts.findIndex((text) => text.model === 1);
  right.value = String(second > 0 ? second : Math.min(1, data.texts.length - 1));
  [left, right].forEach((select) => select.addEventListener("change", showComparison));
}

function showComparison() {
  const places = [Number(byId("left").value), Number(byId("right").value)];
  const [first, second] = places.map((place) => data.texts[place]);
  ["left", "right"].forEach((side, n) => {
    const text = data.texts[places[n]];
    byId(`${side}-title`).textContent = data.models.length > 1 ? `${text.title} (${data.models[text.model]})` : text.title;
    byId(`${side}-text`).replaceChildren(...turnNodes(text));
  });
  const maps = [meanMap(first), meanMap(second)];
  const found = intervals(...places);
  const values = found ? found.map(([value]) => value) : data.columns.map((_, c) => maps[1][0][c] - maps[0][0][c]);
  byId("compare-note").textContent = differenceInWords(values, found);
  showDifference(maps, values, found);
  showMapDifference(maps);
}

// What numbers.py has found for the pair, the other way round where it was asked for the other way round.
function intervals(left, right) {
  const turned = data.differences[`${right}-${left}`];
  return data.differences[`${left}-${right}`] ?? turned?.map(([value, low, high]) => [-value, -high, -low]);
}

function differenceInWords(values, found) {
  const clear = (n) => found && (found[n][1] > 0 || found[n][2] < 0);
  const changed = data.columns.map((name, n) => [name, values[n], n]).filter(([, value, n]) => clear(n) && Math.abs(value) >= 0.005);
  if (!found) return "There is no interval for this pair.";
  if (!changed.length) return "No interval is clear of 0.";
  changed.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return `Intervals clear of 0, in the second: ${changed.slice(0, 3).map(([name, value]) => `${Math.abs(100 * value).toFixed(1)} points ${value > 0 ? "more" : "less"} of ${name}`).join(", ")}.`;
}

function showDifference(maps, values, found) {
  const head = ["", "first", "second", "difference, points", ...(found ? ["from", "to"] : [])];
  const rows = data.columns.map((name, n) => [name, percent(maps[0][0][n], 1), percent(maps[1][0][n], 1), points(values[n]), ...(found ? found[n].slice(1).map(points) : [])]);
  const [lows, highs] = found ? [1, 2].map((end) => found.map((one) => one[end] * 100)) : [null, null];
  chart("difference", {
    make: () => dots(data.columns, values.map((x) => 100 * x), lows, highs, {
      xtitle: "points", words: (x) => points(x / 100), colour: (n) => data.looks[n].colour,
    }),
    numbers: table(head, rows), height: 90 + 28 * data.columns.length,
  });
}

function showMapDifference(maps) {
  const values = maps[0].slice(1).map((row, k) => row.map((x, c) => maps[1][k + 1][c] - x));
  const numbers = { rows: data.bands.slice(1), columns: data.columns, values };
  const inPoints = { ...numbers, values: values.map((row) => row.map((x) => 100 * x)) };
  chart("map-difference", {
    make: () => heat(inPoints, { xtitle: "layer", colours: balance, words: (x) => points(x / 100), ticks: ".0f" }),
    numbers: asTable(numbers, "layer", points), height: 90 + 28 * data.columns.length,
  });
}
