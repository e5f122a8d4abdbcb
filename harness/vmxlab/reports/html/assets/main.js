// The page: shows what the address says, and changes it by what a person does.

function showView() {
  document.body.dataset.view = state.view;
  for (const link of document.querySelectorAll(".bar nav a"))
    if (link.dataset.view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
}

let searched = null;

function show() {
  readState();
  showView();
  if (index === null) return;
  showFilter();
  const key = JSON.stringify([state.q, state.v, state.e, state.r]);
  if (searched !== key) {
    const first = searched === null;
    searched = key;
    found = search(state);
    layOutRows();
    describeFound();
    if (!first) byId("rows").scrollTop = 0;
  }
  drawRows();
  if (state.view === "tests") {
    reveal(rowOf(state.t));
    drawRows();
    showTest();
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    if (state.view !== "tests") setState({ view: "tests" }, { step: true });
    show(); // now: what is hidden can't have the focus
    byId("q").focus();
    byId("q").select();
  } else if (event.key === "Escape" && event.target === byId("q")) {
    byId("q").blur();
  } else if (event.key === "Enter" && event.target === byId("q")) {
    event.preventDefault();
    stepTo(1);
  } else if ((event.key === "j" || event.key === "k") && !typing && state.view === "tests") {
    stepTo(event.key === "j" ? 1 : -1);
  }
}

// On paper there is no scrolling: as many rows as fit a few pages, and a word about the rest.
const ROWS_ON_PAPER = 1000;

function beforePrint() {
  if (state.view !== "tests" || state.t !== "") return;
  const printed = rows.slice(0, ROWS_ON_PAPER).map((row) => (row.test === undefined ? fileRow(row.file) : testRow(row.test)));
  if (rows.length > ROWS_ON_PAPER) printed.push(el("p.notice", null, `${ROWS_ON_PAPER} of ${rows.length} rows`));
  byId("sizer").replaceChildren(...printed);
}

addEventListener("hashchange", show);
addEventListener("keydown", onKey);
addEventListener("resize", drawRows);
addEventListener("beforeprint", beforePrint);
addEventListener("afterprint", drawRows);
byId("rows").addEventListener("scroll", drawRows, { passive: true });
show();
unpacked(byId("index")).then((told) => {
  index = told;
  prepareSearch();
  fillFilter();
  show();
  document.body.dataset.ready = "";
}).catch((error) => {
  byId("main").prepend(el("p.notice", null, `The data of this page can't be read (${error.message}). It takes a browser of 2023 or later.`));
  throw error;
});
