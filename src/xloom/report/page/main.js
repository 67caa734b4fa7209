// The start: unpack, set up, draw; and drawing again when the colours, the width or the paper change.

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
  if (shown.text) showToken(shown.text, shown.token);
  if (window.Plotly) redraw();
}

function setUpDrawingAgain() {
  byId("theme").addEventListener("click", () => showTheme(isDark() ? "light" : "dark"));
  dark.addEventListener("change", () => showTheme());
  const print = (starts) => {
    printing = starts;
    showTheme();
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (printing || width === document.body.clientWidth) return;
    width = document.body.clientWidth;
    redraw();
  }).observe(document.body);
}

function showLead() {
  const texts = data.texts.filter((text) => text.model === 0);
  const experts = data.columns.filter((name) => name !== "base");
  const [model, second] = data.models;
  const other = second ? [", compared with ", el("b", {}, second)] : [];
  const mixed = `${count(experts.length, "expert")}, mixed anew at every token and layer, in ${count(texts.length, "text")}`;
  byId("lead").replaceChildren(mixed, ...(model ? [" by ", el("b", {}, model)] : []), ...other, ".");
}

async function main() {
  data = JSON.parse(asText(await unpacked("data")));
  maps = await unpacked("maps");
  drawLegends();
  showLead();
  setUpOverview();
  setUpTexts();
  setUpCompare();
  setUpDrawingAgain();
  showTheme();
  showText(0);
  const library = el("script");
  library.textContent = asText(await unpacked("plotly"));
  document.head.append(library);
  showOverview("all");
  showText(0);
  showComparison();
  showWorth();
  document.documentElement.dataset.ready = "yes";
}

main().catch((error) => {
  byId("failed").textContent = `The page could not be drawn: ${error.message}. It needs a browser of 2023 or later.`;
  byId("failed").hidden = false;
  throw error;
});
