"use strict";
// Cards of samples. All text goes through textContent and setAttribute, never through HTML.

const cards = (() => {
  const FIRST_PIECES = 1500; // of a conversation; the rest is shown on request
  const HEAT = [0.1, 0.5, 1, 2, 4]; // nats; from each on, a token has the next colour
  const SVG = "http://www.w3.org/2000/svg";

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawBoxes(medium) {
    const [width, height] = medium.size;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("class", "boxes");
    for (const [left, top, right, bottom, written] of medium.boxes) {
      for (const name of ["under", "over"]) {
        const box = document.createElementNS(SVG, "rect");
        const place = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
        for (const [key, value] of Object.entries(place)) box.setAttribute(key, value);
        box.setAttribute("class", name);
        if (name === "over") {
          const title = document.createElementNS(SVG, "title");
          title.textContent = written;
          box.append(title);
        }
        svg.append(box);
      }
    }
    return svg;
  }

  function frame(medium, one, alt) {
    const image = element("img", { src: one.small, alt, loading: "lazy", decoding: "async",
      width: medium.size[0], height: medium.size[1] });
    const link = element("a", { href: one.full, target: "_blank", rel: "noopener", title: "full size" }, image);
    if (medium.boxes.length) link.append(drawBoxes(medium));
    const figure = element("figure", {}, link);
    if (one.time !== null) figure.append(element("figcaption", {}, `${one.time} s`));
    return figure;
  }

  function describe(medium) {
    const [width, height] = medium.size;
    const grid = medium.grid.join(" × ");
    if (medium.kind === "image") {
      return `${medium.before[0]} × ${medium.before[1]} resized to ${width} × ${height} pixels, grid ${grid}`;
    }
    const shown = medium.frames.length < medium.sampled ? `, ${medium.frames.length} shown` : "";
    return `${medium.sampled} of ${medium.source_frames} frames${shown}, ${width} × ${height} pixels, grid ${grid}; ` +
      `timestamps ${medium.stamps.join(", ")} s`;
  }

  function mediumBlock(medium, place) {
    const block = element("div", { class: `medium ${medium.kind}` });
    const frames = element("div", { class: "frames" });
    medium.frames.forEach((one, number) => {
      const alt = medium.kind === "video" ? `frame ${number + 1} of ${medium.name}` : medium.name;
      frames.append(frame(medium, one, alt));
    });
    if (!medium.frames.length) frames.append(element("p", { class: "missing" }, "cannot be decoded"));
    block.append(frames, element("p", { class: "note" }, element("strong", {}, `${place + 1}. ${medium.name}`),
      element("br"), describe(medium)));
    return block;
  }

  function* pieces(runs) {
    for (const [kind, content] of runs) {
      if (kind === 2) {
        const [token, id, count] = content;
        yield element("span", { class: "chip", title: `id ${id}` }, `${token} × ${count}`);
        continue;
      }
      for (const [text, ids, special, loss] of content) {
        const heat = loss === undefined ? "" : `heat h${HEAT.filter((least) => loss >= least).length}`;
        const names = [kind === 1 ? "trained" : "", special ? "special" : "", heat].filter(Boolean).join(" ");
        const title = loss === undefined ? `id ${ids}` : `id ${ids}, loss ${loss} nats`;
        yield element("span", { title, ...(names && { class: names }) }, text);
      }
    }
  }

  function conversation(runs) {
    const block = element("div", { class: "conversation" });
    const left = pieces(runs);
    const more = element("button", { type: "button" }, "Show all");
    const add = (most) => {
      for (let number = 0; number < most; number += 1) {
        const { value, done } = left.next();
        if (done) return false;
        block.append(value);
      }
      return true;
    };
    if (add(FIRST_PIECES)) {
      more.addEventListener("click", () => { more.remove(); add(Infinity); });
      return [block, more];
    }
    return [block];
  }

  function card(sample, number) {
    const head = element("header", {}, element("strong", {}, sample.id ?? `#${number + 1}`),
      element("span", { class: "tag" }, sample.dataset), element("span", { class: "tag" }, sample.kind));
    if (sample.tokens) {
      const vision = sample.vision ? `, ${sample.vision.toLocaleString("en")} of media` : "";
      head.append(element("span", { class: "note" }, `${sample.tokens.toLocaleString("en")} tokens, ` +
        `${sample.trained.toLocaleString("en")} trained${vision}`));
    }
    const made = element("article", { class: "card sample", tabindex: "-1", "data-number": number }, head);
    if (sample.rank) made.append(ranking.buttons(sample.rank));
    for (const [category, reason] of sample.problems) {
      made.append(element("p", { class: "problem" }, element("strong", {}, category), ` ${reason}`));
    }
    if (sample.media?.length) made.append(element("div", { class: "all-media" }, ...sample.media.map(mediumBlock)));
    if (sample.boxes_left) {
      made.append(element("p", { class: "note" }, "Boxes not drawn, since it is unknown which image they belong to: " +
        `${sample.boxes_left}.`));
    }
    if (sample.weights?.length) made.append(element("p", { class: "note" }, `${sample.weights.join("; ")}.`));
    if (sample.runs) made.append(...conversation(sample.runs));
    if (sample.raw) made.append(element("pre", { class: "raw" }, sample.raw));
    made.append(element("p", { class: "note place" }, sample.place));
    return made;
  }

  return { card, element };
})();
