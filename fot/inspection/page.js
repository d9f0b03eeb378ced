"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const layerSelect = byId("layer"), headSelect = byId("head");
const CONTEXT = 8;        // tokens shown on either side
const MOST_PASSAGES = 8;
const MOST_DOCUMENTS = 10;
const DECADES = 4;        // of the strip's logarithmic scale
const NARROWEST_LABEL = 72;  // pixels

// A generated token shows what was looked at when it was chosen, a prompt token what was looked at when it was read.
const queryAt = new Map(data.queries.map((query) => [query.position, query]));
const queryOf = (place) => queryAt.get(data.tokens[place][1] ? place - 1 : place);

let pinned = null;        // the token that was chosen
let shown = null;         // the token whose passages are shown
let allDocuments = false;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const count = (number) => number.toLocaleString("en");
const percent = (share) => {
  if (share === 0) return "0%";
  if (share < 0.0001) return "< 0.01%";
  return (100 * share).toFixed(share < 0.01 ? 2 : 1) + "%";
};
const oneLine = (text) => text.replace(/\s+/g, " ");
const quoted = (text) => "“" + (oneLine(text).trim() || oneLine(text).replace(/ /g, "␣") || "…") + "”";

// ---- what is chosen: numbers of layers and heads -------------------------------------------------------------------

const chosenLayers = () => layerSelect.value === "all" ? data.layers.map((_, i) => i) : [Number(layerSelect.value)];
const chosenHeads = () => headSelect.value === "all" ? [...Array(data.heads).keys()] : [Number(headSelect.value)];

function memoryShare(query) {
  let sum = 0, number = 0;
  for (const layer of chosenLayers()) for (const head of chosenHeads()) { sum += 1 - query.local[layer][head]; number += 1; }
  return sum / number;
}

// ---- tokens --------------------------------------------------------------------------------------------------------

function fillTokens() {
  const box = byId("tokens");
  let group = null, kind = null;
  data.tokens.forEach(([text, generated], place) => {
    if (generated !== kind) {
      kind = generated;
      const name = generated ? "Answer" : "Prompt";
      group = element("div", { role: "group", "aria-label": name }, element("h3", { "aria-hidden": "true" }, name));
      box.append(group);
    }
    // A space in front stays outside, so that a token at the end of a line is not torn in two.
    const bare = text.replace(/^ (?=.)/, "");
    if (group.childNodes.length > 1) group.append(text.slice(0, text.length - bare.length));
    const token = element("span", { class: "token", role: "option", tabindex: "-1", id: "token-" + place, "aria-selected": "false" });
    for (const part of bare.split(/(\n)/)) {
      if (part === "\n") token.append(element("span", { class: "sign" }, "↵"), "\n");
      else token.append(part);
    }
    if (text === "") token.append(element("span", { class: "sign" }, "·"));
    group.append(token);
  });
}

function colourTokens() {
  data.tokens.forEach(([text], place) => {
    const token = byId("token-" + place), query = queryOf(place);
    const share = query ? memoryShare(query) : 0;
    token.style.setProperty("--share", share.toFixed(3));
    token.classList.toggle("none", !query);
    const label = query ? ", " + percent(share) + " of its attention on memory" : ", not recorded";
    token.setAttribute("aria-label", (oneLine(text) || "part of a character") + label);
  });
}

function select(place, focus) {
  pinned = place;
  document.querySelectorAll('.token[aria-selected="true"]').forEach((token) => token.setAttribute("aria-selected", "false"));
  document.querySelectorAll('.token[tabindex="0"]').forEach((token) => token.setAttribute("tabindex", "-1"));
  const token = byId("token-" + place);
  token.setAttribute("aria-selected", "true");
  token.setAttribute("tabindex", "0");
  if (focus) token.focus();
  show(place);
  history.replaceState(null, "", "#token=" + place);
}

/** The token that lies above or below, on the nearest line that way. */
function verticalNeighbour(place, step) {
  const boxOf = (number) => [...byId("token-" + number).getClientRects()].pop();
  const from = boxOf(place);
  let best = place, distance = Infinity;
  for (let other = place + step; other >= 0 && other < data.tokens.length; other += step) {
    const box = boxOf(other);
    const lines = step * (box.top - from.top) / from.height;
    if (lines < 0.5) continue;
    const far = Math.abs(box.left - from.left) + 4 * from.height * lines;
    if (far < distance) { best = other; distance = far; }
    if (lines > 3) break;
  }
  return best;
}

function onKey(event) {
  const last = data.tokens.length - 1;
  const moves = {
    ArrowRight: () => Math.min(last, pinned + 1), ArrowLeft: () => Math.max(0, pinned - 1),
    ArrowDown: () => verticalNeighbour(pinned, 1), ArrowUp: () => verticalNeighbour(pinned, -1),
    Home: () => 0, End: () => last,
  };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(moves[event.key](), true);
}

// ---- passages ------------------------------------------------------------------------------------------------------

/** Passages with hits of the chosen layers and heads, in the order of Trace.passages, which merged and ranked them. */
function passagesOf(query) {
  const layers = new Set(chosenLayers()), heads = new Set(chosenHeads());
  const hits = query.hits.filter(([layer, head]) => layers.has(layer) && heads.has(head));
  hits.sort((a, b) => a[8] - b[8] || a[3] - b[3]);
  const passages = [];
  for (const hit of hits) {
    const last = passages[passages.length - 1];
    if (last && last.rank === hit[8]) { last.hits.push(hit); last.stop = hit[3] + 1; }
    else passages.push({ rank: hit[8], region: hit[2], start: hit[3], stop: hit[3] + 1, hits: [hit] });
  }
  const number = layers.size * heads.size, onMemory = number * memoryShare(query);
  for (const passage of passages) {
    const sum = passage.hits.reduce((total, hit) => total + hit[6], 0);
    passage.share = sum / number;
    passage.knn = onMemory ? Math.min(1, sum / onMemory) : 0;
    passage.best = passage.hits.reduce((a, b) => (b[6] > a[6] ? b : a));
  }
  return passages;
}

function excerpt(passage) {
  const { texts } = data.regions[passage.region];
  const weights = new Map();
  for (const hit of passage.hits) weights.set(hit[3], (weights.get(hit[3]) || 0) + hit[6]);
  const most = Math.max(...weights.values());
  const line = element("p", { class: "excerpt" });
  const from = Math.max(0, passage.start - CONTEXT), to = Math.min(texts.length, passage.stop + CONTEXT);
  if (from > 0 || data.regions[passage.region].start > 0) line.append("… ");
  for (let at = from; at < to; at += 1) {
    const text = at === from ? oneLine(texts[at]).replace(/^ (?=.)/, "") : oneLine(texts[at]);
    if (!weights.has(at)) { line.append(text); continue; }
    // A space in front belongs to the token but is not marked.
    const bare = text.replace(/^ (?=.)/, ""), weight = weights.get(at) / most;
    const mark = element("mark", weight === 1 ? { class: "best" } : {}, bare);
    mark.style.setProperty("--weight", weight.toFixed(2));
    line.append(text.slice(0, text.length - bare.length), mark);
  }
  line.append("\u00a0…");
  return line;
}

const scoreNames = (layer, head) => "layer " + data.layers[layer] + ", head " + head;

function scoreList(passage) {
  const best = passage.best;
  const pairs = [["attention", percent(passage.share)], ["kNN", percent(passage.knn)],
    ["focus", best[7].toFixed(2)], ["score", best[4].toFixed(1)], ["strongest in", scoreNames(best[0], best[1])]];
  if (passage.hits.length === 1) pairs[4][0] = "in";
  return element("dl", { class: "scores" }, ...pairs.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function hitTable(passage) {
  const head = element("tr", {}, ...["token", "layer", "head", "score", "kNN", "attention", "focus"].map((name) => element("th", { scope: "col" }, name)));
  const rows = [...passage.hits].sort((a, b) => b[6] - a[6]).map((hit) => element("tr", {}, ...[
    oneLine(data.regions[hit[2]].texts[hit[3]]).trim() || "␣", String(data.layers[hit[0]]), String(hit[1]),
    hit[4].toFixed(2), percent(hit[5]), percent(hit[6]), hit[7].toFixed(2)].map((text) => element("td", {}, text))));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("details", {}, element("summary", {}, rows.length + " hits"), element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Hits" }, table));
}

function card(passage) {
  const region = data.regions[passage.region], memory = data.memories.find((one) => one.number === region.memory);
  const slot = region.start + passage.best[3];
  const position = "token " + count(slot) + " of " + count(memory.tokens);
  const where = element("span", { class: "quiet number" }, position);
  if (region.span) where.title = "around characters " + count(region.span[0]) + " to " + count(region.span[1]);
  const item = element("li", {}, element("div", { class: "source" }, element("b", {}, region.document), where), excerpt(passage), scoreList(passage));
  if (passage.hits.length > 1) item.append(hitTable(passage));
  return item;
}

function show(place) {
  shown = place;
  const [text, generated] = data.tokens[place], query = queryOf(place);
  const title = byId("panel-title"), facts = byId("panel-facts"), list = byId("passages");
  title.textContent = (generated ? "Looked at when choosing " : "Looked at when reading ") + quoted(text);
  list.replaceChildren();
  drawTicks(query);
  if (!query) {
    facts.textContent = "Nothing was recorded here: this part of the prompt had moved to memory before the answer began.";
    return;
  }
  const passages = passagesOf(query), share = memoryShare(query);
  facts.textContent = percent(share) + " of the attention went to memory, " + percent(1 - share) + " stayed in the local window.";
  if (!passages.length) facts.textContent += " No memory was retrieved.";
  list.append(...passages.slice(0, MOST_PASSAGES).map(card));
  byId("panel").scrollTop = 0;
}

// ---- the whole memory ----------------------------------------------------------------------------------------------

const binMass = (memory, bin) => chosenLayers().reduce((sum, layer) => sum + memory.mass[layer][bin], 0);

function drawStrip() {
  const box = byId("strip");
  box.replaceChildren();
  let largest = 0, total = 0;
  for (const memory of data.memories) for (let bin = 0; bin < memory.mass[0].length; bin += 1) {
    const mass = binMass(memory, bin);
    total += mass;
    largest = Math.max(largest, mass / memory.width);
  }
  for (const memory of data.memories) box.append(strip(memory, largest, total));
  drawTicks(shown === null ? null : queryOf(shown));
}

function strip(memory, largest, total) {
  const bins = memory.mass[0].length, whole = bins * memory.width;
  const name = memory.own ? "the prompt’s own memory" : "the memory";
  const svg = drawing("svg", { viewBox: "0 0 " + whole + " 46", height: 46, preserveAspectRatio: "none", role: "img" });
  let heaviest = 0;
  svg.append(drawing("rect", { class: "ground", x: 0, y: 12, width: memory.tokens, height: 34 }));
  for (let bin = 0; bin < bins; bin += 1) {
    const mass = binMass(memory, bin);
    if (mass > binMass(memory, heaviest)) heaviest = bin;
    // The share of a token, not of a bin, so that memories of any size compare.
    const depth = largest ? 1 + Math.log10(mass / memory.width / largest) / DECADES : 0;
    if (!(depth > 0)) continue;
    const kind = depth > 0.8 ? "bin peak" : "bin";  // peaks get a stroke, to be seen on a narrow screen
    svg.append(drawing("rect", { class: kind, x: bin * memory.width, y: 12, width: memory.width, height: 34, opacity: (depth ** 1.5).toFixed(2) }));
  }
  memory.boundaries.slice(1).forEach(([, start]) =>
    svg.append(drawing("line", { class: "edge", x1: start, x2: start, y1: 12, y2: 46 })));
  svg.append(drawing("g", { class: "ticks", "data-memory": memory.number }));
  const share = total ? binMass(memory, heaviest) / total : 0;
  svg.setAttribute("aria-label", "Attention along " + name + ", " + count(memory.tokens) + " tokens; most of it, " +
    percent(share) + ", at tokens " + count(heaviest * memory.width) + " to " + count((heaviest + 1) * memory.width - 1));
  svg.addEventListener("pointermove", (event) => readOut(event, svg, memory, whole, total));
  svg.addEventListener("pointerleave", () => { byId("strip-readout").textContent = ""; });
  return element("div", { class: "memory" }, svg, edges(memory, whole));
}

function edges(memory, whole) {
  const row = element("div", { class: "edges", "aria-hidden": "true" });
  memory.boundaries.forEach(([name, start], number) => {
    const next = number + 1 < memory.boundaries.length ? memory.boundaries[number + 1][1] : memory.tokens;
    const width = 100 * (next - start) / whole;
    if (width / 100 * byId("strip").clientWidth < NARROWEST_LABEL) return;
    const label = element("span", { title: name }, name);
    label.style.left = 100 * start / whole + "%";
    label.style.width = width + "%";
    row.append(label);
  });
  return row;
}

function readOut(event, svg, memory, whole, total) {
  const box = svg.getBoundingClientRect();
  const slot = Math.min(memory.tokens - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * whole)));
  const bin = Math.floor(slot / memory.width);
  const document_ = memory.boundaries.reduce((name, [next, start]) => (start <= slot ? next : name), "");
  byId("strip-readout").textContent = document_ + ", tokens " + count(bin * memory.width) + " to " +
    count(Math.min(memory.tokens, (bin + 1) * memory.width) - 1) + ": " + percent(total ? binMass(memory, bin) / total : 0) + " of the attention to memory";
}

/** Marks above the strip where the shown token's passages lie. */
function drawTicks(query) {
  document.querySelectorAll(".ticks").forEach((group) => {
    group.replaceChildren();
    if (!query) return;
    const svg = group.ownerSVGElement, unit = svg.viewBox.baseVal.width / Math.max(1, svg.getBoundingClientRect().width);
    for (const passage of passagesOf(query).slice(0, MOST_PASSAGES)) {
      const region = data.regions[passage.region];
      if (region.memory !== Number(group.dataset.memory)) continue;
      const x = region.start + passage.best[3];
      group.append(drawing("polygon", { class: "tick", points: (x - 5 * unit) + ",0 " + (x + 5 * unit) + ",0 " + x + ",10" }));
    }
  });
}

// ---- documents -----------------------------------------------------------------------------------------------------

function listDocuments() {
  const massOf = (entry) => chosenLayers().reduce((sum, layer) => sum + entry.mass[layer], 0);
  const entries = data.documents.map((entry) => ({ ...entry, sum: massOf(entry) })).sort((a, b) => b.sum - a.sum);
  const total = entries.reduce((sum, entry) => sum + entry.sum, 0);
  const list = byId("documents");
  list.replaceChildren(...entries.slice(0, allDocuments ? undefined : MOST_DOCUMENTS).map((entry) => {
    const share = total ? entry.sum / total : 0, bar = element("i");
    bar.style.width = 100 * share + "%";
    return element("li", {}, element("span", {}, entry.name, " ", element("span", { class: "quiet number" }, count(entry.tokens) + " tokens")),
      element("b", {}, percent(share)), element("div", { class: "bar", "aria-hidden": "true" }, bar));
  }));
  document.querySelectorAll("#sources .more").forEach((button) => button.remove());
  if (entries.length > MOST_DOCUMENTS && !allDocuments) {
    const more = element("button", { type: "button", class: "more" }, "All " + count(entries.length));
    more.addEventListener("click", () => { allDocuments = true; listDocuments(); });
    byId("sources").append(more);
  }
}

// ---- start ---------------------------------------------------------------------------------------------------------

function fillFacts() {
  const tokens = data.memories.reduce((sum, memory) => sum + memory.tokens, 0);
  const answer = data.queries.filter((query) => query.position + 1 < data.tokens.length && data.tokens[query.position + 1][1]);
  const share = answer.length ? answer.reduce((sum, query) => sum + memoryShare(query), 0) / answer.length : 0;
  byId("facts").textContent = [data.model, count(tokens) + " tokens in memory",
    (data.layers.length === 1 ? "memory layer " : "memory layers ") + data.layers.join(", "),
    percent(share) + " of the answer’s attention in them on memory"].filter(Boolean).join(" · ");
  byId("strip-facts").textContent = (data.complete ? "Every stored token counts" : "Only retrieved tokens count (" +
    percent(data.coverage) + " of the attention to memory)") +
    ", while the answer was chosen, all heads. Colour is logarithmic, over four powers of ten. Blue marks: passages of the selected token.";
  byId("limits").textContent = "This page holds the " + data.limit + " strongest hits of each token, layer and head. Attention shows where the model looked, not why it answered so.";
}

function refresh() {
  colourTokens();
  drawStrip();
  listDocuments();
  if (shown !== null) show(shown);
}

function fromAddress() {
  const place = Number((location.hash.match(/token=(\d+)/) || [])[1] ?? NaN);
  if (place in data.tokens) return place;
  const first = data.tokens.findIndex(([, generated]) => generated);
  return first < 0 ? data.tokens.length - 1 : first;
}

function start() {
  const options = (select_, all, names) => select_.append(new Option(all, "all"), ...names.map((name, i) => new Option(name, String(i))));
  options(layerSelect, "all, pooled", data.layers.map((layer) => String(layer)));
  options(headSelect, "all, pooled", [...Array(data.heads).keys()].map(String));
  fillTokens();
  fillFacts();
  const box = byId("tokens"), tokenAt = (event) => event.target.closest(".token");
  const placeOf = (token) => Number(token.id.slice("token-".length));
  box.addEventListener("keydown", onKey);
  box.addEventListener("click", (event) => { const token = tokenAt(event); if (token) select(placeOf(token), true); });
  box.addEventListener("pointerover", (event) => { const token = tokenAt(event); if (token && event.pointerType === "mouse") show(placeOf(token)); });
  box.addEventListener("pointerleave", () => { if (shown !== pinned) show(pinned); });
  layerSelect.addEventListener("change", refresh);
  headSelect.addEventListener("change", refresh);
  addEventListener("hashchange", () => select(fromAddress(), false));
  addEventListener("resize", drawStrip);
  refresh();
  select(fromAddress(), false);
}

start();
