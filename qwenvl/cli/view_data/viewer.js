"use strict";
// Filters, pages and keys. Data come as scripts that call viewer.samples and viewer.texts.

const viewer = (() => {
  const A_PAGE = 10;
  const ANY = "";
  const WITH_PROBLEM = "*";
  const form = document.getElementById("filters");
  const list = document.getElementById("samples");
  const files = new Map(); // name of a data file -> promise of its content
  const waiting = new Map(); // name of a data file -> function that takes its content
  let index, state, found = [], turn = 0;

  function load(name) {
    if (!files.has(name)) {
      files.set(name, new Promise((resolve, reject) => {
        waiting.set(name, resolve);
        const script = cards.element("script", { src: `data/${name}.js` });
        script.addEventListener("error", () => {
          files.delete(name);
          reject(new Error(`data/${name}.js cannot be read`));
        });
        document.head.append(script);
      }));
    }
    return files.get(name);
  }

  const take = (kind) => (number, items) => waiting.get(`${kind}_${number}`)(items);

  function readHash() {
    const values = new URLSearchParams(location.hash.slice(1));
    const page = Math.max(1, parseInt(values.get("page"), 10) || 1);
    const read = (name) => values.get(name) ?? ANY;
    return { dataset: read("dataset"), kind: read("kind"), problem: read("problem"), q: read("q"), page };
  }

  function writeHash() {
    const values = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) {
      if (value !== ANY && !(name === "page" && value === 1)) values.set(name, value);
    }
    history.replaceState(null, "", `#${values}`);
  }

  function options(select, values) {
    select.replaceChildren(...values.map(([value, label]) => cards.element("option", { value }, label)));
  }

  function fillForm() {
    const counts = [new Map(), new Map(), new Map()];
    const count = (place, key) => counts[place].set(key, (counts[place].get(key) ?? 0) + 1);
    let bad = 0;
    for (const [dataset, kind, problems] of index.samples) {
      count(0, index.datasets[dataset]);
      count(1, index.kinds[kind]);
      problems.forEach((one) => count(2, one));
      bad += problems.length > 0;
    }
    const all = `any (${index.samples.length})`;
    const named = (place) => [...counts[place]].map(([name, number]) => [name, `${name} (${number})`]);
    options(form.elements.dataset, [[ANY, all], ...named(0)]);
    options(form.elements.kind, [[ANY, all], ...named(1)]);
    options(form.elements.problem, [[ANY, all], [WITH_PROBLEM, `with a problem (${bad})`], ...named(2)]);
  }

  function fits([dataset, kind, problems]) {
    return (state.dataset === ANY || index.datasets[dataset] === state.dataset) &&
      (state.kind === ANY || index.kinds[kind] === state.kind) &&
      (state.problem === ANY || (state.problem === WITH_PROBLEM ? problems.length > 0 : problems.includes(state.problem)));
  }

  async function search() {
    const chosen = [];
    index.samples.forEach((one, number) => { if (fits(one)) chosen.push(number); });
    const wanted = state.q.trim().toLowerCase();
    if (!wanted) return chosen;
    const numbers = [...Array(index.text_files).keys()];
    const texts = (await Promise.all(numbers.map((number) => load(`texts_${number}`)))).flat();
    return chosen.filter((number) => texts[number].includes(wanted));
  }

  async function show(focus = null) {
    const mine = ++turn;
    try {
      const chosen = await search();
      const pages = Math.max(1, Math.ceil(chosen.length / A_PAGE));
      const page = Math.min(state.page, pages);
      const numbers = chosen.slice((page - 1) * A_PAGE, page * A_PAGE);
      const each = index.samples_a_file;
      const read = await Promise.all(numbers.map((number) => load(`samples_${Math.floor(number / each)}`)));
      if (mine !== turn) return; // another filter was chosen meanwhile
      found = chosen;
      state.page = page;
      list.replaceChildren(...numbers.map((number, place) => cards.card(read[place][number % each], number)));
      const unit = chosen.length === 1 ? index.unit : `${index.unit}s`;
      const says = `${chosen.length.toLocaleString("en")} ${unit}, page ${page} of ${pages}`;
      document.querySelectorAll(".pager span").forEach((one) => { one.textContent = says; });
      document.querySelectorAll(".pager button").forEach((one) => {
        one.disabled = one.dataset.step < 0 ? page === 1 : page === pages;
      });
      if (focus !== null) list.children[focus < 0 ? list.children.length - 1 : focus]?.focus();
    } catch (error) {
      list.replaceChildren(cards.element("p", { class: "problem" }, error.message));
    }
    writeHash();
  }

  function turnPage(step, focus = 0) {
    const pages = Math.ceil(found.length / A_PAGE);
    if (state.page + step < 1 || state.page + step > pages) return;
    state.page += step;
    show(focus);
  }

  function move(step) {
    const current = [...list.children].indexOf(document.activeElement.closest?.(".sample"));
    const next = current < 0 ? (step > 0 ? 0 : -1) : current + step;
    if (next >= 0 && next < list.children.length) list.children[next].focus();
    else if (current >= 0) turnPage(step, step > 0 ? 0 : -1);
  }

  const KEYS = {
    j: () => move(1), ArrowRight: () => move(1), k: () => move(-1), ArrowLeft: () => move(-1),
    n: () => turnPage(1), p: () => turnPage(-1), "/": () => form.elements.q.focus(),
    b: () => document.body.classList.toggle("no-boxes"),
  };

  function onKey(event) {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && typing) typing.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  }

  function start(given) {
    index = given;
    fillForm();
    const fromHash = () => {
      state = readHash();
      for (const name of ["dataset", "kind", "problem", "q"]) form.elements[name].value = state[name];
      show();
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      state = { page: 1 };
      for (const name of ["dataset", "kind", "problem", "q"]) state[name] = form.elements[name].value;
      show();
    });
    document.querySelectorAll(".pager button").forEach((button) => {
      button.addEventListener("click", () => turnPage(Number(button.dataset.step)));
    });
    document.addEventListener("keydown", onKey);
    window.addEventListener("hashchange", fromHash);
    fromHash();
  }

  return { samples: take("samples"), texts: take("texts"), set index(given) { start(given); } };
})();
