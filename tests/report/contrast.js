// Texts whose contrast with what lies behind them is too small by WCAG 2.2 AA (1.4.3): 4.5, or 3 for large text.
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (colour) => { // any CSS colour -> red, green, blue of 0 to 255 and alpha of 0 to 1
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (front, back) => back.map((value, i) => i === 3 ? 1 : front[i] * front[3] + value * (1 - front[3]));
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const canvas = dark ? [18, 18, 18, 1] : [255, 255, 255, 1];
  // What is painted from the page's ground up to an element, and the element's colour on top of it.
  const colours = (element, property) => {
    const chain = [];
    for (let one = element; one instanceof Element; one = one.parentElement) chain.unshift(one);
    let back = canvas, opacity = 1, ground = canvas;
    for (const one of chain) {
      const style = getComputedStyle(one);
      if (Number(style.opacity) < 1) { opacity *= Number(style.opacity); ground = back; }
      back = over(read(style.backgroundColor), back);
    }
    const [r, g, b, a] = read(getComputedStyle(element)[property]);
    const behind = opacity < 1 ? over([...back.slice(0, 3), opacity], ground) : back;
    return [over([r, g, b, a * opacity], behind), behind];
  };
  const found = [];
  let seen = 0;
  const check = (element, text, property) => {
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (!text.trim() || style.visibility === "hidden" || style.display === "none" || !box.width || element.disabled) return;
    seen += 1;
    const size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const [front, back] = colours(element, property);
    const contrast = ratio(front, back);
    if (contrast < needed) {
      const name = `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""}`;
      found.push(`${name} "${text.trim().slice(0, 40)}": ${contrast.toFixed(2)}, at least ${needed}`);
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (element.closest("script, style, noscript, title, option, datalist")) continue;
    check(element, walker.currentNode.data, element instanceof SVGElement ? "fill" : "color");
  }
  for (const element of document.querySelectorAll("input, select, textarea")) check(element, element.value || "x", "color");
  // Graphics that carry meaning (1.4.11): lines, bars and swatches against what lies behind the drawing; 3.
  const drawn = [["fill", ".bar, .dot, .share rect, .member"], ["stroke", ".line, .axis"], ["backgroundColor", ".swatch"]];
  for (const [property, selector] of drawn) {
    for (const element of document.querySelectorAll(selector)) {
      const behind = colours(element.closest("svg, p, li, td, div"), "color")[1];
      const front = over(read(getComputedStyle(element)[property]), behind);
      seen += 1;
      if (ratio(front, behind) < 3) found.push(`${element.getAttribute("class")}: ${ratio(front, behind).toFixed(2)}, at least 3`);
    }
  }
  return { seen, found: [...new Set(found)] };
})()
