// The exits of a case on a line: a mark each, coloured by its reason.

const LINE_HEIGHT = 30, MARK_MOST = 18;

function exitInWords(exit, number) {
  return `exit ${number}: ${exit[X.FAILED] ? "VM-entry failure, " : ""}${reasonName(exit[X.REASON])}${exit[X.WORDS] !== "-" ? ", " + exit[X.WORDS] : ""}, RIP ${exit[X.RIP]}`;
}

// `pick(number)` is called for the mark that is chosen. What it gives has `select(number)`.
function timeline(item, pick) {
  const exits = item.exits;
  const canvas = el("canvas.line", {
    tabindex: "0", role: "slider", "aria-label": "exits, in order",
    "aria-valuemin": "0", "aria-valuemax": `${exits.length - 1}`, "aria-valuenow": "0",
    "aria-valuetext": exitInWords(exits[0], 0),
  });
  const words = el("p.pointed", { "aria-hidden": "true" });
  let selected = -1, pointed = -1;

  const pitch = () => Math.min(MARK_MOST, canvas.clientWidth / exits.length);
  const at = (event) => {
    const number = Math.floor((event.clientX - canvas.getBoundingClientRect().left) / pitch());
    return number >= 0 && number < exits.length ? number : -1;
  };
  const draw = () => {
    const scale = devicePixelRatio || 1, width = canvas.clientWidth;
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = LINE_HEIGHT * scale;
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    pen.scale(scale, scale);
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(0, LINE_HEIGHT / 2 - 0.5, width, 1);
    const each = pitch(), thick = Math.max(1, each > 4 ? each - 2 : each);
    exits.forEach((exit, number) => {
      const high = number === selected || number === pointed;
      pen.fillStyle = reasonColor(exit[X.REASON]);
      pen.fillRect(number * each, high ? 0 : 5, thick, high ? LINE_HEIGHT : LINE_HEIGHT - 10);
      if (exit[X.FAILED]) { // a VM entry that failed: hollow
        pen.fillStyle = style.getPropertyValue("--paper");
        pen.fillRect(number * each + 2, 9, Math.max(0, thick - 4), LINE_HEIGHT - 18);
      }
    });
    if (selected >= 0) {
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.strokeRect(selected * each - 0.5, 0.5, thick + 1, LINE_HEIGHT - 1);
    }
  };
  const tell = () => {
    const number = pointed >= 0 ? pointed : selected;
    words.textContent = number >= 0 ? exitInWords(exits[number], number) : endInWords(item);
  };
  const select = (number) => {
    selected = number;
    canvas.setAttribute("aria-valuenow", number);
    canvas.setAttribute("aria-valuetext", exitInWords(exits[number], number));
    draw();
    tell();
  };
  canvas.addEventListener("mousemove", (event) => { pointed = at(event); draw(); tell(); });
  canvas.addEventListener("mouseleave", () => { pointed = -1; draw(); tell(); });
  canvas.addEventListener("click", (event) => { if (at(event) >= 0) { select(at(event)); pick(selected); } });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -exits.length, End: exits.length, PageUp: -10, PageDown: 10 }[event.key];
    if (step === undefined && event.key !== "Enter") return;
    event.preventDefault();
    select(Math.max(0, Math.min(exits.length - 1, selected + (step || 0))));
    if (event.key === "Enter") pick(selected);
  });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  tell();
  return { element: el("div.timeline", null, canvas, words, legend(exits)), select };
}

function endInWords(item) {
  const cut = item.total > item.exits.length ? `${item.exits.length.toLocaleString("en")} of ${item.total.toLocaleString("en")} exits; the rest is in the log` : counted(item.total, "exit");
  return `${cut}; the case ended by ${item.end ? `"${item.end}"` : "nothing: the records stop"}`;
}

function legend(exits) {
  const counts = new Map();
  for (const exit of exits) counts.set(exit[X.REASON], (counts.get(exit[X.REASON]) || 0) + 1);
  const sorted = [...counts].sort((one, other) => other[1] - one[1]);
  return el("ul.legend", null, sorted.map(([number, count]) =>
    el("li", null, swatch(number), reasonName(number), el("small", null, ` ${count}`))));
}
