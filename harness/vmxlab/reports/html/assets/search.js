// Which tests and cases fit the filter. All words must be met, each in the test or in the case.

let lowered = null;

function prepareSearch() {
  const low = (text) => text.toLowerCase();
  lowered = {
    descriptions: index.descriptions.map(low),
    tests: index.tests.map((test) => low(`${index.files[test[T.FILE]]}::${test[T.NAME]} ${test[T.WHY]} ${test[T.ID]}`)),
    titles: index.cases.map((made) => low(made[C.TITLE])),
    engines: index.engines.map(low),
    reasons: new Map(Object.entries(index.reasons).map(([number, name]) => [Number(number), low(name)])),
  };
}

// Words, and what stands in quotation marks as it is.
function wordsOf(text) {
  return [...text.toLowerCase().matchAll(/"([^"]*)"?|(\S+)/g)].map((found) => found[1] ?? found[2]).filter(Boolean);
}

function matcher(word) {
  const has = (text) => text.includes(word);
  const descriptions = new Set();
  lowered.descriptions.forEach((text, at) => has(text) && descriptions.add(at));
  const reasons = new Set([...lowered.reasons].filter(([, name]) => has(name)).map(([number]) => number));
  const engines = new Set();
  lowered.engines.forEach((text, at) => has(text) && engines.add(at));
  return {
    test: (at) => has(lowered.tests[at]),
    case: (at) => {
      const made = index.cases[at];
      return has(lowered.titles[at]) || engines.has(made[C.ENGINE])
        || made[C.REASONS].some((number) => reasons.has(number)) || made[C.WORDS].some((number) => descriptions.has(number));
    },
  };
}

// {tests: numbers, cases: a Set of those that fit, asked: whether cases were asked for at all}
function search({ q, v, e, r }) {
  const matchers = wordsOf(q).map(matcher);
  const verdicts = new Set(v ? v.split(",") : []);
  const reason = r === "" ? null : Number(r);
  const tests = [], cases = new Set();
  index.tests.forEach((test, at) => {
    if (verdicts.size && !verdicts.has(index.verdicts[test[T.VERDICT]][0])) return;
    if (e !== null && index.platforms[test[T.PLATFORM]] !== e) return;
    const open = matchers.filter((one) => !one.test(at));
    let fits = !open.length && reason === null;
    for (let one = test[T.FIRST]; one < test[T.FIRST] + test[T.CASES]; one++) {
      if (reason !== null && !index.cases[one][C.REASONS].includes(reason)) continue;
      if (!open.every((wanted) => wanted.case(one))) continue;
      cases.add(one);
      fits = true;
    }
    if (fits) tests.push(at);
  });
  return { tests, cases, asked: matchers.length > 0 || reason !== null };
}
