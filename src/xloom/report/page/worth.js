// What turning experts off does, and how much they add.

function showWorth() {
  if (data.worth) {
    const rows = data.worth.slice(1); // the first is the model as it is
    const expert = (row) => data.columns.indexOf(row.expert);
    chart("worth", {
      make: () => dots(rows.map((row) => row.variant), rows.map((row) => row.change), rows.map((row) => row.low), rows.map((row) => row.high), {
        xtitle: "nats per token", words: signed, colour: (n) => (expert(rows[n]) < 0 ? "#9A9A9A" : data.looks[expert(rows[n])].colour),
      }),
      height: 80 + 24 * rows.length,
    });
    byId("chart-worth").querySelector("details").remove();
    const cells = data.worth.map((row, n) => [
      row.variant, row.loss.toFixed(3), n ? signed(row.change) : "", n ? `${signed(row.low)} to ${signed(row.high)}` : "", n ? percent(row.changed) : "",
    ]);
    byId("worth-table").replaceChildren(table(["", "loss, nats per token", "change", "interval", "answers that change"], cells));
  }
  if (data.contributions) {
    const { layer } = data.contributions;
    chart("contributions", {
      make: () => heat(layer, { xtitle: "layer" }), numbers: asTable(layer, "layer"), height: 90 + 26 * layer.columns.length,
    });
  }
}
