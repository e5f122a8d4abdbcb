// The I/O and MSR bitmaps as pictures: a square a bit, by what was asked for and what happened.

const LOW_MSRS = 0, HIGH_MSRS = 0xc0000000, MSR_BITS = 0x2000;
const EDGE = 4; // what was met is drawn larger than its bit, at an edge too
const STATES = { passed: 1, exited: 2 };

// `spans`: first and last of each range of 1 bits; `met`: pairs of number and exits, 0 where it passed.
function bitPicture(spans, met, { first, count, columns, square, label, what }) {
  const intercepted = new Uint8Array(count), happened = new Uint8Array(count), exits = new Map();
  for (const [from, to] of spans) if (to >= first && from < first + count) intercepted.fill(1, Math.max(0, from - first), to - first + 1);
  for (const [number, times] of met) {
    if (number < first || number >= first + count) continue;
    happened[number - first] = times ? STATES.exited : STATES.passed;
    exits.set(number - first, times);
  }
  const lines = count / columns;
  const canvas = el("canvas.bits", { role: "img", "aria-label": label, width: columns * square + 2 * EDGE, height: lines * square + 2 * EDGE });
  const words = el("p.pointed", { "aria-hidden": "true" });
  const summary = `${counted(intercepted.reduce((sum, bit) => sum + bit, 0), "bit")} of ${count.toLocaleString("en")} set`;
  const draw = () => {
    const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(name);
    pen.fillStyle = color("--bit-clear");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    const fill = (at, size) => {
      const out = EDGE - (size - square) / 2;
      pen.fillRect((at % columns) * square + out, Math.floor(at / columns) * square + out, size, size);
    };
    pen.fillStyle = color("--bit-set");
    for (let at = 0; at < count; at++) if (intercepted[at]) fill(at, square);
    // What was met is drawn larger than its bit, or it would not be seen among thousands.
    happened.forEach((state, at) => {
      if (!state) return;
      pen.fillStyle = color("--paper");
      fill(at, square + 6);
      pen.fillStyle = color(state === STATES.exited ? "--bit-exited" : "--bit-passed");
      fill(at, square + 4);
    });
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (pixels, shown, drawn) => Math.floor((pixels * drawn / shown - EDGE) / square);
    const column = place(event.clientX - box.left, box.width, canvas.width), line = place(event.clientY - box.top, box.height, canvas.height);
    if (column < 0 || column >= columns || line < 0 || line >= lines) return;
    const at = line * columns + column;
    const times = exits.get(at);
    words.textContent = `${what} ${hex(first + at)}: bit is ${intercepted[at]}${times === undefined ? "" : times ? `, exited ${counted(times, "time")}` : ", accessed without an exit"}`;
  });
  canvas.addEventListener("mouseleave", () => { words.textContent = summary; });
  words.textContent = summary;
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return el("figure", null, el("figcaption", null, label), canvas, words);
}

function bitLegend() {
  const key = (name, text) => el("li", null, el(`i.swatch.${name}`, { "aria-hidden": "true" }), text);
  return el("ul.legend", null,
    key("set", "intercepted (bit is 1)"), key("clear", "not intercepted"), key("exited", "an access exited"), key("passed", "accessed, no exit"));
}

const PASSED_NOTE = "Accesses that exited are known from the exits. One that passes leaves no trace: \"accessed, no exit\" is said only where the program shows it, in the straight line before its last exit, with the port or MSR as an immediate or just loaded into DX or ECX.";

// What was met, in words: a picture alone tells it to nobody who can't see it.
function metTable(what, met, spans) {
  const isSet = (number) => spans.some(([from, to]) => number >= from && number <= to);
  const rows = met.map(([number, times]) => [hex(number), isSet(number) ? "1" : "0", times ? `${times}` : "0 (passed)"]);
  const body = table("met", [what, "bit", "exits"], ["mono", "number", "number"], rows.slice(0, 200));
  return rows.length > 200 ? [body, el("p.quiet", null, `200 of ${rows.length} are listed; the picture has all`)] : [body];
}

function ioPicture(structure, accesses) {
  const met = accesses.ports || [];
  return [
    bitLegend(),
    el("div.figures", null,
      bitPicture(structure.ports, met, { first: 0, count: 0x10000, columns: 256, square: 2, label: "ports 0x0 to 0xffff, 256 a line", what: "port" }),
      el("div", null, met.length ? metTable("port", met, structure.ports) : el("p.quiet", null, "No access to a port is known."), rangesInWords(structure.ports))),
    el("p.quiet", null, PASSED_NOTE),
  ];
}

function msrPicture(structure, accesses) {
  const panel = (direction, first) => bitPicture(structure[direction], accesses[`${direction}s`] || [], {
    first, count: MSR_BITS, columns: 128, square: 2, what: "MSR",
    label: `${direction === "read" ? "RDMSR" : "WRMSR"} of ${hex(first)} to ${hex(first + MSR_BITS - 1)}`,
  });
  const met = ["read", "write"].flatMap((direction) => (accesses[`${direction}s`] || []).length
    ? metTable(direction === "read" ? "RDMSR of" : "WRMSR of", accesses[`${direction}s`], structure[direction]) : []);
  return [
    bitLegend(),
    el("div.figures", null, panel("read", LOW_MSRS), panel("read", HIGH_MSRS), panel("write", LOW_MSRS), panel("write", HIGH_MSRS)),
    el("p.quiet", null, "An MSR outside these ranges has no bit, and always exits."),
    met.length ? met : el("p.quiet", null, "No RDMSR or WRMSR is known."),
    el("p.quiet", null, PASSED_NOTE),
  ];
}

function rangesInWords(spans) {
  const words = spans.slice(0, 24).map(([from, to]) => (from === to ? hex(from) : `${hex(from)}-${hex(to)}`));
  const more = spans.length > 24 ? `, and ${spans.length - 24} more ranges` : "";
  return el("p.quiet.mono", null, `intercepted: ${words.join(", ") || "nothing"}${more}`);
}
