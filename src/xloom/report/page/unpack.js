// What the page carries: the numbers, the maps of single tokens, and the charts' library.

let data; // as numbers.py writes it
let maps; // one byte for each share: text after text, of each [tokens, bands, columns]

async function unpacked(name) {
  const node = document.getElementById(`packed-${name}`);
  const bytes = Uint8Array.from(atob(node.textContent), (letter) => letter.charCodeAt(0));
  node.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const asText = (bytes) => new TextDecoder().decode(bytes);

// The share, 0 to 1, of a column (expert or base) in a band (all sites, or a layer) of a token.
function share(text, token, band, column) {
  return maps[text.at + (token * data.bands.length + band) * data.columns.length + column] / 255;
}

// Mean shares of a text, [bands][columns], over its tokens that have any.
function meanMap(text) {
  const known = text.tokens.map((_, token) => token).filter((token) => !text.unknownTokens.has(token));
  const mean = (band, column) => known.reduce((sum, token) => sum + share(text, token, band, column), 0) / known.length;
  return data.bands.map((_, band) => data.columns.map((_, column) => (known.length ? mean(band, column) : 0)));
}

// The column that leads a token, of equal ones the first.
function leader(text, token) {
  let best = 0;
  for (let column = 1; column < data.columns.length; column++) {
    if (share(text, token, 0, column) > share(text, token, 0, best)) best = column;
  }
  return best;
}
