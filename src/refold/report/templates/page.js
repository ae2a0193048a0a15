"use strict";
// Zooming and panning of the networks, and what happens in the region that the pointer or the focus is at. Everything
// that is shown is in the page already; names are moved as nodes, never as text to be parsed.
(() => {
  const views = [...document.querySelectorAll(".view")];
  const panel = document.getElementById("panel");

  // ---- zoom and pan
  const zooms = new Map();
  function zoom(view, scale, x = view.clientWidth / 2, y = view.clientHeight / 2) {
    const svg = view.firstElementChild, box = svg.viewBox.baseVal;
    const old = zooms.get(view) || 1;
    scale = Math.min(4, Math.max(0.02, scale));
    const left = (view.scrollLeft + x) / old, top = (view.scrollTop + y) / old;
    svg.setAttribute("width", box.width * scale);
    svg.setAttribute("height", box.height * scale);
    zooms.set(view, scale);
    view.scrollLeft = left * scale - x;
    view.scrollTop = top * scale - y;
  }
  function width(view) {
    return (view.clientWidth - 4) / view.firstElementChild.viewBox.baseVal.width;
  }
  function whole(view) {
    return Math.min(width(view), (view.clientHeight - 4) / view.firstElementChild.viewBox.baseVal.height);
  }
  function button(text, label, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.title = label;
    made.addEventListener("click", act);
    return made;
  }
  for (const view of views) {
    zooms.set(view, 1);
    zoom(view, Math.min(1, Math.max(0.5, width(view))), 0, 0);
    const tools = document.createElement("span");
    tools.className = "tools";
    tools.append(
      button("+", "zoom in", () => zoom(view, zooms.get(view) * 1.3)),
      button("−", "zoom out", () => zoom(view, zooms.get(view) / 1.3)),
      button("1:1", "natural size", () => zoom(view, 1)),
      button("fit", "show all of it", () => zoom(view, whole(view))),
    );
    view.parentElement.querySelector("figcaption").append(tools);
    view.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const place = view.getBoundingClientRect();
      zoom(view, zooms.get(view) * Math.exp(-event.deltaY / 300), event.clientX - place.left, event.clientY - place.top);
    }, { passive: false });
    view.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "+" || event.key === "=") zoom(view, zooms.get(view) * 1.3);
      else if (event.key === "-") zoom(view, zooms.get(view) / 1.3);
      else if (event.key === "0") zoom(view, whole(view));
      else return;
      event.preventDefault();
    });
    let grip = null;
    view.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      grip = { x: event.clientX + view.scrollLeft, y: event.clientY + view.scrollTop, moved: false };
    });
    view.addEventListener("pointermove", (event) => {
      if (!grip || !(event.buttons & 1)) return;
      const left = grip.x - event.clientX, top = grip.y - event.clientY;
      if (!grip.moved && Math.hypot(left - view.scrollLeft, top - view.scrollTop) < 4) return;
      if (!grip.moved) view.setPointerCapture(event.pointerId);
      grip.moved = true;
      view.classList.add("dragged");
      view.scrollLeft = left;
      view.scrollTop = top;
    });
    for (const kind of ["pointerup", "pointercancel"]) view.addEventListener(kind, () => {
      view.classList.remove("dragged");
      setTimeout(() => { grip = null; });
    });
    view.addEventListener("click", (event) => {
      if (grip && grip.moved) event.preventDefault(), event.stopImmediatePropagation();
    }, true);
    view.addEventListener("dragstart", (event) => event.preventDefault());
  }

  // Small networks need no large frame; side by side, both have the same.
  const stacked = matchMedia("(max-width:820px)").matches;
  const tall = views.map((view) => Math.max(240, view.firstElementChild.getBoundingClientRect().height + 20));
  views.forEach((view, index) => { view.style.maxHeight = `${stacked ? tall[index] : Math.max(...tall)}px`; });

  // ---- regions
  const boxes = new Map();
  for (const link of document.querySelectorAll(".view a")) {
    const key = link.getAttribute("href");
    if (!boxes.has(key)) boxes.set(key, []);
    boxes.get(key).push(link);
  }
  let shown = null;
  function show(link) {
    const key = link.getAttribute("href");
    if (shown !== key) {
      if (shown) for (const box of boxes.get(shown)) box.classList.remove("on");
      for (const box of boxes.get(key)) box.classList.add("on");
      shown = key;
      const card = document.getElementById(key.slice(1)).cloneNode(true);
      const [head, body] = panel.children;
      panel.className = card.classList[1];
      panel.hidden = false;
      head.replaceChildren(...card.querySelector("summary").childNodes);
      card.querySelector("summary").remove();
      body.replaceChildren(...card.childNodes);
      panel.scrollTop = 0;
    }
    const name = link.querySelector("title").textContent;
    for (const row of panel.querySelectorAll("tbody tr")) {
      row.classList.toggle("here", row.cells[0].textContent === name);
    }
  }
  function clear() {
    if (!shown) return;
    for (const box of boxes.get(shown)) box.classList.remove("on");
    shown = null;
    panel.hidden = true;
  }
  function reveal(view, box) {
    const inner = box.getBoundingClientRect(), outer = view.getBoundingClientRect();
    view.scrollBy({
      left: inner.left + inner.width / 2 - outer.left - outer.width / 2,
      top: inner.top + inner.height / 2 - outer.top - outer.height / 3,
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
  }
  for (const view of views) {
    const links = [...view.querySelectorAll("a")];
    // One stop for the Tab key in each picture; the arrow keys go on from there.
    links.forEach((link, index) => { link.setAttribute("tabindex", index ? -1 : 0); });
    const linkOf = (event) => event.target.closest && event.target.closest("a");
    view.addEventListener("pointerover", (event) => { const link = linkOf(event); if (link) show(link); });
    view.addEventListener("focusin", (event) => { const link = linkOf(event); if (link) show(link); });
    view.addEventListener("click", (event) => {
      const link = linkOf(event);
      if (!link) return;
      event.preventDefault();
      show(link);
      for (const other of views) {
        const first = boxes.get(link.getAttribute("href")).find((box) => other.contains(box));
        if (other !== view && first) reveal(other, first);
      }
    });
    view.addEventListener("keydown", (event) => {
      const link = linkOf(event);
      if (event.key === "Escape") clear();
      if (!link) return;
      const index = links.indexOf(link);
      const next = {
        ArrowDown: index + 1, ArrowRight: index + 1, ArrowUp: index - 1, ArrowLeft: index - 1,
        Home: 0, End: links.length - 1,
      }[event.key];
      if (next === undefined || !links[next]) return;
      event.preventDefault();
      links[index].setAttribute("tabindex", -1);
      links[next].setAttribute("tabindex", 0);
      links[next].focus();
    });
  }

  // ---- print everything, also what is closed
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
  // A link to a region opens its card.
  function open() {
    const card = /^#r\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (card) card.open = true;
  }
  addEventListener("hashchange", open);
  open();
})();
