// What is shown, as the fragment of the address has it: a link leads to the same.

const state = { view: "overview", q: "", v: "", e: null, r: "", t: "", c: "" };

function readState() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(state)) state[key] = found.get(key) ?? (key === "e" ? null : "");
  if (!byId(state.view)) state.view = "overview";
}

function fragment(changes) {
  const wanted = { ...state, ...changes };
  const kept = Object.entries(wanted).filter(([key, value]) => value !== null && (value !== "" || key === "e"));
  return "#" + new URLSearchParams(kept).toString();
}

// Without an entry in the history: typing is no step back. location.replace, because it works from disk.
function setState(changes, { step = false } = {}) {
  const to = fragment(changes);
  if (to === location.hash) return;
  if (step) location.hash = to;
  else location.replace(to);
}
