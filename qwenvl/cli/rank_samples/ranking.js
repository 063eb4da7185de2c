"use strict";
// Buttons that keep or drop a sample, and the file of the decisions. The browser remembers them for this ranking.

const ranking = (() => {
  const stored = `decisions ${document.body.dataset.ranking}`; // file:// pages share one storage
  const decisions = recall(); // place of a sample as text -> whether it is kept, where that differs from the list
  const status = document.getElementById("decided");

  function recall() {
    try {
      return new Map(JSON.parse(localStorage.getItem(stored) ?? "[]"));
    } catch { // no storage: some browsers have none for files
      return new Map();
    }
  }

  function remember() {
    try {
      if (decisions.size) localStorage.setItem(stored, JSON.stringify([...decisions]));
      else localStorage.removeItem(stored);
      return "remembered by this browser";
    } catch {
      return "lost when this page is reloaded";
    }
  }

  function say() {
    const made = `${decisions.size.toLocaleString("en")} decided against the list`;
    const told = remember();
    status.textContent = decisions.size ? `${made}, ${told}` : made;
  }

  function buttons(rank) {
    const place = JSON.stringify(rank.place);
    const block = cards.element("div", { class: "ranked" },
      cards.element("strong", {}, `${rank.number}. score ${rank.score.toFixed(1)}`));
    const choices = [["keep", true], ["drop", false]].map(([name, keep]) => {
      const button = cards.element("button", { type: "button", class: name }, name);
      button.addEventListener("click", () => {
        if (keep === rank.keep) decisions.delete(place);
        else decisions.set(place, keep);
        press();
        say();
      });
      return [button, keep];
    });
    function press() {
      const kept = decisions.get(place) ?? rank.keep;
      for (const [button, keep] of choices) button.setAttribute("aria-pressed", String(keep === kept));
    }
    press();
    block.append(...choices.map(([button]) => button),
      cards.element("span", { class: "note" }, rank.figures.join(", ")));
    return block;
  }

  function download() {
    const lines = [...decisions].map(([place, keep]) => `${JSON.stringify({ ...JSON.parse(place), keep })}\n`);
    const link = cards.element("a", { download: "decisions.jsonl",
      href: `data:application/jsonl;charset=utf-8,${encodeURIComponent(lines.join(""))}` });
    document.body.append(link);
    link.click();
    link.remove();
  }

  document.getElementById("download").addEventListener("click", download);
  say();
  return { buttons };
})();
