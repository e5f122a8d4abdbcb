// The list: a row a test below a row a file. Only the rows in sight are in the document.

const ROW = 26, BEYOND = 12;
let found = { tests: [], cases: new Set(), asked: false };
let rows = [];

function layOutRows() {
  rows = [];
  let file = -1;
  for (const at of found.tests) {
    const test = index.tests[at];
    if (test[T.FILE] !== file) {
      file = test[T.FILE];
      rows.push({ file });
    }
    rows.push({ test: at });
  }
  byId("sizer").style.height = `${rows.length * ROW}px`;
}

function drawRows() {
  const pane = byId("rows"), sizer = byId("sizer");
  if (!pane.clientHeight) return;
  const first = Math.max(0, Math.floor(pane.scrollTop / ROW) - BEYOND);
  const last = Math.min(rows.length, Math.ceil((pane.scrollTop + pane.clientHeight) / ROW) + BEYOND);
  sizer.replaceChildren(...rows.slice(first, last).map((row, at) => {
    const made = row.test === undefined ? fileRow(row.file) : testRow(row.test);
    made.style.top = `${(first + at) * ROW}px`;
    return made;
  }));
}

function fileRow(file) {
  return el("div.file", { title: index.files[file] }, index.files[file]);
}

function testRow(at) {
  const test = index.tests[at];
  const [verdict, words] = index.verdicts[test[T.VERDICT]];
  const platform = index.platforms[test[T.PLATFORM]];
  const cases = test[T.CASES];
  const [, named, parameters] = /^([^[]*)(.*)$/s.exec(test[T.NAME]);
  return el(`a.row.v-${verdict}`,
    {
      href: fragment({ t: test[T.ID], c: "" }),
      title: test[T.NAME],
      "aria-current": state.t === test[T.ID] ? "true" : null,
      "aria-label": `${words}: ${test[T.NAME]}, ${platform || NO_ENGINE}${cases ? ", " + counted(cases, "case") : ""}`,
    },
    el("i.mark"),
    el("span.name", null, el("span", null, named), parameters ? el("i", null, parameters) : null),
    el("small", null, platform.replace(/ .*/, "")),
    el("small.times", null, cases ? `${cases}` : ""));
}

function describeFound() {
  const of = (number, all) => (number === all ? all.toLocaleString("en") : `${number.toLocaleString("en")} of ${all.toLocaleString("en")}`);
  byId("count").textContent = `${of(found.tests.length, index.tests.length)} tests, ${of(found.cases.size, index.cases.length)} cases`;
}

function rowOf(id) {
  return rows.findIndex((row) => row.test !== undefined && index.tests[row.test][T.ID] === id);
}

function reveal(at) {
  const pane = byId("rows");
  if (at < 0) return;
  if (at * ROW < pane.scrollTop || (at + 1) * ROW > pane.scrollTop + pane.clientHeight)
    pane.scrollTop = at * ROW - pane.clientHeight / 3;
}

// The next test of the list, or the one before.
function stepTo(direction) {
  let at = rowOf(state.t);
  if (at < 0 && direction < 0) at = rows.length;
  for (at += direction; at >= 0 && at < rows.length; at += direction) {
    if (rows[at].test === undefined) continue;
    setState({ view: "tests", t: index.tests[rows[at].test][T.ID], c: "" });
    return;
  }
}

// --- the filter's fields ----------------------------------------------------------------------------------

function fillFilter() {
  const counts = new Map();
  for (const test of index.tests) counts.set(test[T.VERDICT], (counts.get(test[T.VERDICT]) || 0) + 1);
  index.verdicts.forEach(([value, words], at) => {
    if (!counts.has(at)) return;
    const box = el("input", { type: "checkbox", name: "v", value, onchange: takeFilter });
    document.querySelector(".verdicts").append(
      el(`label.chip.v-${value}`, null, box, el("i.mark", { "aria-hidden": "true" }), words, el("small", null, ` ${counts.get(at).toLocaleString("en")}`)));
  });
  // "" is a value of its own here: tests that run on no engine.
  byId("engine").append(...index.platforms.map((name) => el("option", { value: `e${name}` }, name || NO_ENGINE)));
  byId("reason").append(...Object.entries(index.reasons).map(([number, name]) => el("option", { value: number }, `${number}  ${name}`)));
  byId("q").addEventListener("input", takeFilter);
  byId("engine").addEventListener("change", takeFilter);
  byId("reason").addEventListener("change", takeFilter);
  byId("clear").addEventListener("click", () => setState({ q: "", v: "", e: null, r: "" }));
  document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
}

function takeFilter() {
  const engine = byId("engine").value;
  setState({
    q: byId("q").value,
    v: [...document.querySelectorAll(".verdicts input:checked")].map((box) => box.value).join(","),
    e: engine ? engine.slice(1) : null,
    r: byId("reason").value,
  });
}

function showFilter() {
  if (byId("q").value !== state.q) byId("q").value = state.q;
  const wanted = state.v.split(",");
  for (const box of document.querySelectorAll(".verdicts input")) box.checked = wanted.includes(box.value);
  byId("engine").value = state.e === null ? "" : `e${state.e}`;
  byId("reason").value = state.r;
}
