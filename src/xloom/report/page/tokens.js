// Tokens as coloured text that one can point at or go through with the keyboard, and the map of the one that is chosen.

const ANSWER = 1;
const SPECIAL = 2;
const visible = (text) => (text === "" ? "◌" : text.replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/\n/g, "↵\n"));

function tokenNode(text, token) {
  const unknown = text.unknownTokens.has(token);
  const column = leader(text, token);
  const look = data.looks[column];
  return el("span", {
    class: `token${unknown ? " unknown" : ""}${text.flags[token] & SPECIAL ? " special" : ""}`,
    "data-token": token, "data-pattern": look.pattern, "--colour": look.colour,
    "--strength": (0.25 + 0.75 * share(text, token, 0, column)).toFixed(2),
  }, visible(text.tokens[token]));
}

function turnNodes(text, role, tokenOf = tokenNode) {
  return text.turns.map(([name, start, stop]) => {
    const tokens = Array.from({ length: stop - start }, (_, n) => tokenOf(text, start + n));
    return el("div", { class: "turn", role, "aria-label": role && name }, el("span", { class: "role", "aria-hidden": role && "true" }, name), ...tokens);
  });
}

const probability = (text, token) => (text.logprobs[token] == null ? null : Math.exp(text.logprobs[token]));

function inWords(text, token) {
  const said = [`token ${token + 1}`, visible(text.tokens[token]).trim() || "blank", kindOf(text, token)];
  const column = leader(text, token);
  if (!text.unknownTokens.has(token)) said.push(`led by ${data.columns[column]}, ${percent(share(text, token, 0, column))}`);
  if (probability(text, token) != null) said.push(`probability ${percent(probability(text, token))}`);
  return said.join(", ");
}

const kindOf = (text, token) =>
  [text.flags[token] & SPECIAL ? "special" : "", text.flags[token] & ANSWER ? "written by the model" : "read"].filter(Boolean).join(", ");

// A list of which one token is chosen; `onChoose(token)` shows it. One stop of the tab key, then arrow keys.
function fillRibbon(ribbon, text, onChoose) {
  const option = (text, token) => {
    const node = tokenNode(text, token);
    for (const [name, value] of Object.entries({ role: "option", tabindex: -1, "aria-selected": "false", "aria-label": inWords(text, token) })) {
      node.setAttribute(name, value);
    }
    return node;
  };
  ribbon.replaceChildren(...turnNodes(text, "group", option));
  const nodes = [...ribbon.querySelectorAll(".token")];
  let chosen = 0;
  const choose = (token, focus) => {
    if (!nodes[token]) return;
    nodes[chosen].setAttribute("aria-selected", "false");
    nodes[chosen].tabIndex = -1;
    chosen = token;
    nodes[chosen].setAttribute("aria-selected", "true");
    nodes[chosen].tabIndex = 0;
    if (focus) nodes[chosen].focus();
    onChoose(chosen);
  };
  const at = (event) => Number(event.target.closest(".token")?.dataset.token ?? NaN);
  ribbon.onmouseover = (event) => choose(at(event), false);
  ribbon.onclick = (event) => choose(at(event), true);
  ribbon.onkeydown = (event) => {
    const to = step(nodes, chosen, event.key);
    if (to === null) return;
    event.preventDefault();
    choose(to, true);
  };
  return choose;
}

function step(nodes, from, key) {
  const last = nodes.length - 1;
  if (key === "ArrowRight") return Math.min(from + 1, last);
  if (key === "ArrowLeft") return Math.max(from - 1, 0);
  if (key === "Home") return 0;
  if (key === "End") return last;
  if (key !== "ArrowUp" && key !== "ArrowDown") return null;
  const way = key === "ArrowDown" ? 1 : -1;
  const here = nodes[from].getBoundingClientRect();
  let best = from;
  let nearest = Infinity;
  for (let to = from + way; nodes[to]; to += way) {
    const there = nodes[to].getBoundingClientRect();
    const lines = Math.abs(there.top - here.top);
    if (lines > 4 && lines * 20 + Math.abs(there.left - here.left) < nearest) {
      nearest = lines * 20 + Math.abs(there.left - here.left);
      best = to;
    }
  }
  return best;
}

// --- the chosen token ---

function showToken(text, token) {
  const said = probability(text, token);
  const column = leader(text, token);
  const unknown = text.unknownTokens.has(token);
  const known = said == null ? "no probability: nothing came before it" : `probability ${percent(said, said < 0.1 ? 1 : 0)} (logprob ${text.logprobs[token].toFixed(2)})`;
  byId("token").replaceChildren(
    el("h3", {}, `“${visible(text.tokens[token]).replace(/\n/g, "")}”`),
    el("p", {}, `token ${token + 1} of ${text.tokens.length}, ${kindOf(text, token)}`),
    el("p", {}, known),
    el("p", {}, ...(unknown ? ["not mixed: nothing came before it"] : ["led by ", swatch(column), el("b", {}, data.columns[column]), `, ${percent(share(text, token, 0, column))} of its mixing`])),
    ...(unknown ? [] : [tokenMap(text, token)]),
  );
}

function tokenMap(text, token) {
  const head = data.columns.map((name, column) => el("th", { scope: "col", title: name }, el("span", {}, name), swatch(column)));
  const rows = data.bands.map((band, place) => {
    const cells = data.columns.map((name, column) => {
      const value = share(text, token, place, column);
      const cell = el("td", { title: `${name}, ${bandName(place)}: ${percent(value, 1)}` }, value >= 0.005 ? String(Math.round(100 * value)) : "");
      Object.assign(cell.style, shade(value));
      return cell;
    });
    return el("tr", { class: place === 0 ? "all" : "" }, el("th", { scope: "row" }, band), ...cells);
  });
  const caption = el("caption", {}, "Share in %, layer by layer");
  return el("table", { class: "map" }, caption, el("thead", {}, el("tr", {}, el("th", { scope: "col" }), ...head)), el("tbody", {}, ...rows));
}

const bandName = (place) => (place === 0 ? "all sites" : /^\d+$/.test(data.bands[place]) ? `layer ${data.bands[place]}` : data.bands[place]);
