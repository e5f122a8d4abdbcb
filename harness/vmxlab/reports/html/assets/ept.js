// EPT paging structures as a tree; alike neighbours are one line.

const E = { LEVEL: 0, NAME: 1, FIRST: 2, LAST: 3, LEADS: 4, TARGET: 5, SIZE: 6, ATTRIBUTES: 7, FAULT: 8, COUNT: 9 };

function eptTree(structure, accesses) {
  const entries = structure.entries;
  const gpas = accesses.gpas || [];
  if (!entries.length) return [el("p.quiet", null, "Nothing is mapped: the PML4 table is empty."), unmapped(entries, gpas)];
  const root = el("ul.tree");
  const lists = { 4: root };
  for (const entry of entries) {
    const list = lists[entry[E.LEVEL]];
    if (!entry[E.LEADS]) {
      list.append(el("li", null, entryLine(entry, gpas)));
      continue;
    }
    const below = el("ul");
    list.append(el("li", null, el("details", { open: true }, el("summary", null, entryLine(entry, [])), below)));
    lists[entry[E.LEVEL] - 1] = below;
  }
  return [root, unmapped(entries, gpas), el("p.quiet", null, "As the case began. r, w, x: read, write, execute (bits 2:0); +ux, -ux: bit 10, execute for user-mode addresses, where it differs.")];
}

function entryLine(entry, gpas) {
  const range = `${hex(entry[E.FIRST])}-${hex(entry[E.LAST])}`;
  const hits = gpas.filter(([gpa]) => gpa >= entry[E.FIRST] && gpa <= entry[E.LAST]);
  return el("span.entry", null,
    el("b", null, entry[E.NAME]),
    el("span.mono", null, range),
    entry[E.LEADS] ? el("span.quiet", null, "table") : entry[E.TARGET] ? el("span.mono", null, `→ ${entry[E.TARGET]}`) : null,
    el("span.rights", null, entry[E.ATTRIBUTES]),
    entry[E.SIZE] ? el("span.quiet", null, `${entry[E.SIZE]}${entry[E.COUNT] > 1 ? ` × ${entry[E.COUNT]}` : ""}`) : null,
    entry[E.FAULT] ? el("span.fault", null, `misconfigured: ${entry[E.FAULT]}`) : null,
    hits.length ? el("span.hit", null, `${hits.length === 1 ? "exit" : "exits"} ${numbersOf(hits)}`) : null);
}

function numbersOf(hits) {
  const numbers = hits.slice(0, 8).map(([, number]) => number).join(", ");
  return hits.length > 8 ? `${numbers} and ${hits.length - 8} more` : numbers;
}

// Where an exit's address is mapped by no entry: it leads to none, or to one that is all zeros.
function unmapped(entries, gpas) {
  const leaves = entries.filter((entry) => !entry[E.LEADS]);
  const missing = gpas.filter(([gpa]) => !leaves.some((leaf) => gpa >= leaf[E.FIRST] && gpa <= leaf[E.LAST]));
  if (!missing.length) return null;
  const byAddress = new Map();
  for (const hit of missing) byAddress.set(hit[0], [...(byAddress.get(hit[0]) || []), hit]);
  return el("ul.missing", null, [...byAddress].slice(0, 50).map(([gpa, hits]) =>
    el("li", null, el("span.mono", null, hex(gpa)), " is mapped by no entry ",
      el("span.hit", null, `${hits.length === 1 ? "exit" : "exits"} ${numbersOf(hits)}`))),
  byAddress.size > 50 ? el("li", null, `50 of ${byAddress.size} addresses are listed`) : null);
}
