// What all the others use: elements made of text, and the packed data.
// Data becomes text nodes and attributes only; nothing here parses HTML.

function el(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag || "div");
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

const byId = (id) => document.getElementById(id);
const hex = (number) => "0x" + number.toString(16);
const counted = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

async function unpacked(element) {
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// The items of the pieces that were looked at last.
const PIECES_KEPT = 24;
const pieces = new Map();

async function itemAt([piece, position]) {
  let items = pieces.get(piece);
  pieces.delete(piece);
  if (items === undefined) items = unpacked(document.getElementsByClassName("part")[piece]);
  pieces.set(piece, items);
  if (pieces.size > PIECES_KEPT) pieces.delete(pieces.keys().next().value);
  return (await items)[position];
}

// Columns of the index, as vmxlab.reports.html.index writes them.
const T = { FILE: 0, NAME: 1, VERDICT: 2, PLATFORM: 3, SECONDS: 4, WHY: 5, ID: 6, FIRST: 7, CASES: 8, PLACE: 9 };
const C = { TITLE: 0, VERDICT: 1, ENGINE: 2, EXITS: 3, REASONS: 4, WORDS: 5, PLACE: 6 };
// And of an exit, as vmxlab.reports.html.cases does.
const X = { REASON: 0, FAILED: 1, WORDS: 2, RIP: 3, CODE: 4, CHANGED: 5, FIELDS: 6 };
const NO_ENGINE = "no engine";

let index = null;

const reasonName = (number) => index.reasons[number] || `reason ${hex(number)}`;

function verdictBadge(value, words) {
  return el(`span.verdict.v-${value}`, null, el("i.mark", { "aria-hidden": "true" }), words || value);
}

// Neighbouring numbers get hues far from each other.
function reasonHue(number) {
  return Math.round((number * 137.508 + 210) % 360);
}

function reasonColor(number) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return `hsl(${reasonHue(number)} ${dark ? "55% 62%" : "58% 44%"})`;
}

function swatch(number) {
  const made = el("i.swatch", { "aria-hidden": "true" });
  made.style.backgroundColor = reasonColor(number);
  return made;
}

// A table out of rows of texts or elements; `kinds` are classes of the columns.
function table(name, titles, kinds, rows) {
  const cell = (tag, content, at) => el(`${tag}${kinds[at] ? "." + kinds[at] : ""}`, tag === "th" && { scope: "col" }, content);
  return el("div.scroll", null, el(`table.${name}`, null,
    el("thead", null, el("tr", null, titles.map((title, at) => cell("th", title, at)))),
    el("tbody", null, rows.map((row) => el("tr", null, row.map((content, at) => cell("td", content, at)))))));
}

// A part that is made when it is opened first.
function later(title, note, make, open) {
  const body = el("div.body");
  const made = el("details", { open: open || false },
    el("summary", null, title, note ? el("small", null, " ", note) : null), body);
  let done = false;
  const fill = () => {
    if (!made.open || done) return;
    done = true;
    Promise.resolve(make()).then((content) => body.append(...[content].flat().filter((part) => part !== null)));
  };
  made.addEventListener("toggle", fill);
  fill();
  return made;
}

// The first rows, and a button for the next ones.
function paged(items, step, show, into) {
  let shown = 0;
  const button = el("button.more", { type: "button" });
  const more = () => {
    into.append(...items.slice(shown, shown + step).map(show));
    shown = Math.min(shown + step, items.length);
    button.hidden = shown === items.length;
    button.textContent = `${shown.toLocaleString("en")} of ${items.length.toLocaleString("en")}: show ${Math.min(step, items.length - shown)} more`;
  };
  button.addEventListener("click", more);
  more();
  return { button, showUpTo: (number) => { while (shown <= number && shown < items.length) more(); } };
}
