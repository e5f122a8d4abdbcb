// The test that is shown, with its cases.

const CASES_AT_ONCE = 100;
let shownTest = null;
let drawing = 0;

async function showTest() {
  const detail = byId("detail");
  const at = state.t === "" ? -1 : index.tests.findIndex((test) => test[T.ID] === state.t);
  document.body.toggleAttribute("data-open", state.t !== "");
  if (at < 0) {
    shownTest = null;
    if (state.t !== "") detail.replaceChildren(el("p.notice", null, `There is no test ${state.t} here.`), backLink());
    return;
  }
  const key = JSON.stringify([at, state.q, state.r]);
  if (shownTest === key) return;
  shownTest = key;
  const mine = ++drawing;
  const test = index.tests[at];
  const item = await itemAt(test[T.PLACE]);
  if (mine !== drawing) return; // another one was chosen meanwhile
  detail.replaceChildren(...testHead(test, item), await caseList(test));
  detail.scrollTop = 0;
}

function backLink() {
  return el("a.back", { href: fragment({ t: "", c: "" }) }, "← all tests");
}

function testHead(test, item) {
  const [value, words] = index.verdicts[test[T.VERDICT]];
  const facts = [index.platforms[test[T.PLATFORM]] || NO_ENGINE];
  if (test[T.SECONDS] !== null) facts.push(`${test[T.SECONDS].toFixed(2)} s`);
  facts.push(counted(test[T.CASES], "case"));
  const head = [
    backLink(),
    el("p.crumbs", null, index.files[test[T.FILE]]),
    el("h2", null, test[T.NAME]),
    el("p.facts", null, verdictBadge(value, words), facts.map((text) => el("span", null, text))),
  ];
  if (test[T.WHY]) head.push(el("p.why", null, test[T.WHY], item.known ? el("span.quiet", null, ` - ${item.known}`) : null));
  if (item.text) head.push(later("Failure", "", () => el("pre.failure", { tabindex: "0" }, item.text), true));
  for (const [title, text] of item.sections || []) head.push(later(title, "", () => el("pre", { tabindex: "0" }, text)));
  return head;
}

// Those that fit the filter, if it asks for cases and some do; else all.
async function caseList(test) {
  const all = Array.from({ length: test[T.CASES] }, (_, at) => test[T.FIRST] + at);
  const fitting = found.asked ? all.filter((at) => found.cases.has(at)) : all;
  const list = el("div.cases");
  if (!all.length) return el("p.quiet", null, "This test ran no case.");
  const some = fitting.length && fitting.length < all.length;
  const draw = async (wanted) => {
    list.replaceChildren();
    const chosen = state.c === "" ? -1 : test[T.FIRST] + Number(state.c);
    const alone = wanted.length === 1;
    const pages = paged(wanted, CASES_AT_ONCE, (at) => caseEntry(test, at, alone || at === chosen), list);
    pages.showUpTo(Math.max(0, wanted.indexOf(chosen)));
    list.after(pages.button);
  };
  const box = el("div", null, list);
  if (some) {
    const all_button = el("button", { type: "button" }, "show all");
    const note = el("p.notice", null, `${fitting.length} of ${all.length} cases fit the filter. `, all_button);
    all_button.addEventListener("click", () => { note.remove(); for (const button of box.querySelectorAll(":scope > .more")) button.remove(); draw(all); });
    box.prepend(note);
  }
  await draw(some ? fitting : all);
  return box;
}

function caseEntry(test, at, open) {
  const made = index.cases[at];
  const number = at - test[T.FIRST];
  const link = fragment({ t: test[T.ID], c: `${number}` });
  const entry = el("details.case", { open, id: `case-${number}` },
    el("summary", null,
      verdictBadge(made[C.VERDICT]), el("b", null, made[C.TITLE]),
      el("small", null, ` ${index.engines[made[C.ENGINE]]}`),
      el("span.reasons", null, made[C.REASONS].slice(0, 8).map((reason) => el("span", { title: reasonName(reason) }, swatch(reason), el("span.reason-name", null, reasonName(reason))))),
      el("small.number", null, counted(made[C.EXITS], "exit")),
      el("a.link", { href: link, title: "link to this case", "aria-label": "link to this case" }, "#")));
  let done = false;
  const fill = async () => {
    if (!entry.open || done) return;
    done = true;
    const item = await itemAt(made[C.PLACE]);
    entry.append(el("div.body", null, caseView(item)));
  };
  entry.addEventListener("toggle", fill);
  fill();
  return entry;
}
