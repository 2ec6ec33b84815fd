"use strict";
/* Read-outs on hover or touch. Without script the page loses only these. */
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");

  const place = (event) => {
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const right = event.clientX + 16 + width < innerWidth;
    const x = right ? event.clientX + 16 : event.clientX - width - 16;
    tip.style.left = Math.max(6, x) + "px";
    tip.style.top = Math.max(6, Math.min(event.clientY - height - 12, innerHeight - height - 6)) + "px";
  };

  const row = (colour, name, value) => {
    const line = document.createElement("div");
    const dot = document.createElement("i");
    const number = document.createElement("b");
    line.className = "row";
    dot.className = colour;
    number.textContent = value;
    line.append(dot, name, number);
    return line;
  };

  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  const readLines = (chart, event) => {
    const data = (chart.lineData ??= JSON.parse(chart.dataset.lines));
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const [left, right, top, bottom] = data.box;
    const x = Math.min(Math.max(at.x, left), right);
    const hits = data.lines.map((line) => ({ ...line, point: nearest(line.points, x) }));
    const lead = hits.reduce((a, b) => (Math.abs(a.point[0] - x) <= Math.abs(b.point[0] - x) ? a : b)).point;
    let layer = chart.querySelector(".hover");
    if (!layer) {
      layer = document.createElementNS(NS, "g");
      layer.setAttribute("class", "hover");
      chart.append(layer);
    }
    const cross = document.createElementNS(NS, "line");
    const ends = { x1: lead[0], x2: lead[0], y1: top, y2: bottom, class: "cross" };
    Object.entries(ends).forEach(([key, value]) => cross.setAttribute(key, value));
    const dots = hits.map(({ colour, point }) => {
      const dot = document.createElementNS(NS, "circle");
      Object.entries({ cx: point[0], cy: point[1], r: 4, class: `dot ${colour}` })
        .forEach(([key, value]) => dot.setAttribute(key, value));
      return dot;
    });
    layer.replaceChildren(cross, ...dots);
    tip.replaceChildren(`${data.x}: ${lead[2]}`, ...hits.map((h) => row(h.colour, h.name, h.point[3])));
    place(event);
  };

  const clear = () => {
    tip.hidden = true;
    document.querySelectorAll(".hover").forEach((layer) => layer.replaceChildren());
  };

  const look = (event) => {
    const marked = event.target.closest?.("[data-tip]");
    const chart = event.target.closest?.("svg[data-lines]");
    if (marked) {
      tip.replaceChildren(marked.dataset.tip);
      place(event);
    } else if (chart) {
      readLines(chart, event);
    } else {
      clear();
    }
  };
  document.addEventListener("pointermove", look);
  document.addEventListener("pointerdown", look);
  document.addEventListener("scroll", clear, { passive: true });
})();
