// One case: the line of its exits, the exits, and all that it was made of.

const EXITS_AT_ONCE = 200;

function caseView(item) {
  const parts = [el("p.why", null, item.why)];
  if (item.exits.length) parts.push(...exitParts(item));
  if (item.broken) parts.push(later("Rules of VM entry that are broken", `${item.broken.length}`, () =>
    el("ul.rules", null, item.broken.map(brokenRule)), true));
  if (item.remarks) parts.push(later("Remarks", `${item.remarks.length}`, () => el("ul.remarks", null, item.remarks.map((text) => el("li", null, text))), item.remarks.length <= 6));
  if (item.outcomes) parts.push(later("VMX instructions of L1", outcomesInShort(item.outcomes), () =>
    el("ul.outcomes", null, item.outcomes.map(([text, ok]) => el(`li${ok ? "" : ".bad"}`, null, text)))));
  if (item.controls || item.fields) parts.push(later("What differs from the baseline", differencesInShort(item), () => differences(item)));
  for (const [key, title, picture] of [["io_bitmap", "I/O bitmaps", ioPicture], ["msr_bitmap", "MSR bitmap", msrPicture], ["ept", "EPT", eptTree]]) {
    const told = item[key];
    if (!told) continue;
    parts.push(typeof told === "string"
      ? later(title, "not used", () => el("p.quiet", null, told))
      : later(title, key === "ept" ? item.eptp : "", async () => picture(await itemAt(told), item.accesses || {}).flat()));
  }
  if (item.listing) parts.push(later("Program", `${item.mode ? item.mode.toLowerCase() + " mode, " : ""}${counted(item.listing.length, "instruction")}`, () => listing(item)));
  if (item.source) parts.push(later("As a test to paste", "", () => copied(item.source)));
  if (item.log) parts.push(later("Records of the serial log", item.left_out ? `${item.left_out.toLocaleString("en")} more in the log` : "", () => [
    item.log_path ? el("p.quiet", null, "log: ", el("code", null, item.log_path)) : null,
    el("pre", { tabindex: "0" }, item.log),
    item.left_out ? el("p.quiet", null, `${item.left_out.toLocaleString("en")} records of this case are not here; they are in the log.`) : null,
  ]));
  return parts;
}

function brokenRule([rule, section, sentence, values, detail]) {
  return el("li", null, el("b.mono", null, rule), el("small", null, ` SDM Vol. 3C, ${section}`),
    el("p", null, sentence), el("p.mono.quiet", null, [values, detail].filter(Boolean).join("; ")));
}

// --- exits ------------------------------------------------------------------------------------------------

function exitParts(item) {
  const body = el("tbody");
  const rows = [];
  const pages = paged(item.exits.map((exit, number) => [exit, number]), EXITS_AT_ONCE, ([exit, number]) => {
    rows[number] = exitRow(exit, number);
    return rows[number];
  }, body);
  const line = timeline(item, (number) => {
    pages.showUpTo(number);
    show(number);
    rows[number].scrollIntoView({ block: "nearest" });
  });
  let shown = null;
  const show = (number) => {
    if (shown) shown.classList.remove("chosen");
    shown = rows[number];
    shown.classList.add("chosen");
  };
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-n]");
    if (!row) return;
    const number = Number(row.dataset.n);
    line.select(number);
    show(number);
    toggleFields(row, item, number);
  });
  const heads = ["#", "exit", "qualification", "RIP", "instruction", "changed"];
  const exits = el("div.scroll", null, el("table.exits", null,
    el("thead", null, el("tr", null, heads.map((title, at) => el(`th${at === 0 ? ".number" : ""}`, { scope: "col" }, title)))), body));
  const cut = item.total > item.exits.length
    ? el("p.notice", null, `The first ${item.exits.length.toLocaleString("en")} of ${item.total.toLocaleString("en")} exits; the rest is in the log.`) : null;
  return [line.element, cut, exits, pages.button].filter(Boolean);
}

function exitRow(exit, number) {
  return el("tr", { "data-n": number },
    el("td.number", null, el("button.number", { type: "button", "aria-expanded": "false", "aria-label": `fields of exit ${number}` }, `${number}`)),
    el("td.reason", null, swatch(exit[X.REASON]), reasonName(exit[X.REASON]), exit[X.FAILED] ? el("small", null, " VM-entry failure") : null),
    el("td", null, exit[X.WORDS]), el("td.mono", null, exit[X.RIP]), el("td.mono", null, exit[X.CODE]), el("td.mono.changed", null, exit[X.CHANGED]));
}

// L2's registers at an exit: those at entry, with all changes until then.
function registersAt(item, number) {
  const registers = { ...item.at_entry };
  for (const exit of item.exits.slice(0, number + 1))
    for (const [, name, value] of exit[X.CHANGED].matchAll(/(?:^| )(r[a-z0-9]+)=(0x[0-9a-f]+)/g)) registers[name] = value;
  return Object.entries(registers).filter(([, value]) => value !== "0x0").sort();
}

function toggleFields(row, item, number) {
  const next = row.nextElementSibling;
  const open = next && next.classList.contains("fields");
  row.querySelector("button").setAttribute("aria-expanded", String(!open));
  if (open) { next.remove(); return; }
  const list = (pairs) => el("dl", null, pairs.map(([name, value]) => el("div.field", null, el("dt", null, name), el("dd", null, value))));
  row.after(el("tr.fields", null, el("td", { colspan: "6" },
    list(item.exits[number][X.FIELDS]),
    el("p.quiet", null, "Registers of L2 that are not 0"), list(registersAt(item, number)))));
}

// --- the rest ---------------------------------------------------------------------------------------------

function outcomesInShort(outcomes) {
  const failed = outcomes.filter(([, ok]) => !ok).length;
  return `${outcomes.length}${failed ? `, ${failed} failed` : ", all succeeded"}`;
}

function differencesInShort(item) {
  const words = [];
  if (item.controls) words.push(counted(item.controls.length, "control"));
  if (item.fields) words.push(counted(item.fields.length, "field"));
  return words.join(", ");
}

function differences(item) {
  const made = [];
  if (item.controls) made.push(table("controls", ["control", "is", "of the"], ["mono", "", ""],
    item.controls.map(([set, name, value]) => [name, value ? "set" : "cleared", set])));
  if (item.fields) made.push(table("vmcs", ["VMCS field that the case gives", "value"], ["mono", "mono"], item.fields));
  return made;
}

function listing(item) {
  const exits = new Map();
  for (const exit of item.exits) if (!exit[X.FAILED]) exits.set(exit[X.RIP], (exits.get(exit[X.RIP]) || 0) + 1);
  return table("listing", ["address", "bytes", "instruction", "exits"], ["mono", "mono", "mono", "number"],
    item.listing.map(([address, bytes, text]) => [address, bytes, text, exits.has(address) ? `${exits.get(address)}` : ""]));
}

function copied(text) {
  const pre = el("pre", { tabindex: "0" }, text);
  const button = el("button.copy", { type: "button" }, "copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch { // no permission: select it, so that one key copies it
      getSelection().selectAllChildren(pre);
      button.textContent = "selected";
    }
  });
  return el("div.source", null, button, pre);
}
