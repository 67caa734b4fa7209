// One text at a time: its tokens, how its experts take turns, and what they are worth to it.

let shown = { text: null, token: 0 };

function setUpTexts() {
  data.texts.forEach((text) => (text.unknownTokens = new Set(text.unknown)));
  const select = byId("text");
  fillSelect(select, (text) => text.model === 0);
  const move = (by) => {
    const places = [...select.options].map((option) => option.value);
    const to = places[(select.selectedIndex + by + places.length) % places.length];
    select.value = to;
    showText(Number(to));
  };
  select.addEventListener("change", () => showText(Number(select.value)));
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
}

// the texts by their titles, those of a group together
function fillSelect(select, wanted) {
  const groups = new Map();
  data.texts.forEach((text, place) => {
    if (!wanted(text)) return;
    const name = [data.models.length > 1 ? data.models[text.model] : "", text.group].filter(Boolean).join(": ");
    if (!groups.has(name)) groups.set(name, name ? el("optgroup", { label: name }) : select);
    groups.get(name).append(el("option", { value: place }, text.title));
  });
  select.append(...[...groups.values()].filter((group) => group !== select));
}

function showText(place) {
  const text = data.texts[place];
  const show = (token) => {
    shown = { text, token };
    showToken(text, token);
  };
  const choose = fillRibbon(byId("ribbon"), text, show);
  const answer = text.flags.findIndex((flag) => flag === ANSWER);
  choose(Math.max(answer, 0), false);
  const known = text.tokens.length > text.unknown.length;
  if (window.Plotly && known) showTimeline(text, choose);
  showTextWorth(text);
}

function showTimeline(text, choose) {
  const rows = text.segments.map((one) => [`${one.start + 1} to ${one.stop}`, one.leader, ...one.shares.map((x) => percent(x, 1))]);
  chart("timeline", {
    make: () => timeline(text), numbers: table(["tokens", "leads", ...data.columns], rows), height: 300,
  });
  const plot = byId("chart-timeline").querySelector(".plot");
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", (event) => choose(Math.round(event.points[0].x + 0.5) - 1, false));
}

function timeline(text) {
  const size = text.tokens.length;
  const edges = Array.from({ length: size + 1 }, (_, n) => n + 0.5); // tokens are counted from 1
  const hover = [...text.tokens.keys()].map((token) => `token ${token + 1}`);
  const traces = data.columns.map((name, column) => {
    const shares = text.tokens.map((_, token) => share(text, token, 0, column));
    return {
      type: "scatter", mode: "lines", stackgroup: "one", groupnorm: "fraction", name, x: edges, y: [...shares, shares[size - 1]],
      line: { shape: "hv", width: 0 }, fillcolor: data.looks[column].colour, text: [...hover, ""],
      fillpattern: { shape: data.looks[column].pattern, fillmode: "overlay", fgcolor: isDark() ? "#14171b" : "#ffffff", size: 6 },
      hovertemplate: `%{text}: ${escaped(name)} %{y:.0%}<extra></extra>`,
    };
  });
  const cut = (x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: ink(), width: 1.5, dash: "dot" } });
  const turn = ([, start, stop]) => ({ type: "line", x0: start + 0.7, x1: stop + 0.3, y0: 1.03, y1: 1.03, yref: "paper", line: { color: muted(), width: 2 } });
  const label = ([role, start, stop]) => ({ text: role, x: (start + stop + 1) / 2, y: 1.04, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 11, color: muted() } });
  return {
    traces,
    layout: {
      margin: { l: 8, r: 12, t: 28, b: 8 }, shapes: [...text.segments.slice(1).map((one) => cut(one.start + 0.5)), ...text.turns.map(turn)],
      annotations: text.turns.filter(([, start, stop]) => (stop - start) / size > 0.06).map(label),
      xaxis: { title: { text: "token" }, range: [0.5, size + 0.5], showgrid: false }, yaxis: { tickformat: ".0%", range: [0, 1] },
    },
  };
}

function showTextWorth(text) {
  const rows = text.worth.map((one) => [one.variant, signed(one.change), one.changed ? "another" : "the same"]);
  const content = [el("summary", {}, "What the experts are worth to this text"), el("div", { class: "scroll" }, table(["", "change of the loss", "answer"], rows))];
  byId("text-worth").replaceChildren(...(rows.length ? [el("details", { class: "numbers" }, ...content)] : []));
}
