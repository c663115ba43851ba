// The parts of the page that Gradio has not: a pad to draw contours on, and players that scrub through steps.
// They are custom elements, so that they come to life wherever Gradio puts their markup, and need nothing else.
(() => {
  const FRAMES_PER_SECOND = 8;
  const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function svg(tag, attributes = {}, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  }

  // The colours of numbers from 0 to 1: matplotlib's magma and viridis at nine points each.
  const MAPS = {
    magma: ["000004", "1d1147", "51127c", "832681", "b73779", "e75263", "fc8961", "fec488", "fcfdbf"],
    viridis: ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"],
  };
  function colours(name) {
    const points = MAPS[name].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return Array.from({ length: 256 }, (_, value) => {
      const place = (value / 255) * (points.length - 1);
      const low = Math.min(points.length - 2, Math.floor(place));
      return [0, 1, 2].map((k) => points[low][k] + (place - low) * (points[low + 1][k] - points[low][k]));
    });
  }
  const MAGMA = colours("magma");
  const VIRIDIS = colours("viridis");
  const gradient = (map) => `linear-gradient(to right, ${MAPS[map].map((hex) => `#${hex}`).join(", ")})`;

  async function picture(source) {
    const image = new Image();
    image.src = source;
    await image.decode();
    return image;
  }

  // Grey values of the part of a picture that starts at a row.
  function grey(image, width, height, row = 0) {
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, row, width, height, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    return Uint8ClampedArray.from({ length: width * height }, (_, i) => data[4 * i]);
  }

  function paint(canvas, colour) {
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    for (let i = 0; i < canvas.width * canvas.height; i++) pixels.data.set([...colour(i), 255], 4 * i);
    context.putImageData(pixels, 0, 0);
  }

  function figure(width, height, label, ...caption) {
    const canvas = element("canvas", { width, height, role: "img", "aria-label": label });
    return [element("figure", {}, canvas, element("figcaption", {}, ...caption)), canvas];
  }

  // A play button, a slider and the step, below whatever `show` draws.
  class Steps extends HTMLElement {
    static observedAttributes = ["data-show"];

    connectedCallback() {
      this.renew();
    }

    // Gradio updates what is on the page in place, attribute by attribute, and takes away children it does not know.
    attributeChangedCallback() {
      if (this.isConnected) queueMicrotask(() => this.renew());
    }

    renew() {
      if (this.dataset.show === this.built) return;
      this.built = this.dataset.show;
      this.data = JSON.parse(this.built);
      clearInterval(this.timer);
      this.timer = undefined;
      this.replaceChildren();
      delete this.dataset.ready;
      this.build();
    }

    disconnectedCallback() {
      clearInterval(this.timer);
      this.timer = undefined;
    }

    bar(steps, marks, name) {
      this.steps = steps;
      this.button = element("button", { type: "button", class: "play" });
      this.slider = element("input", { type: "range", min: 1, max: steps.length, step: 1, value: 1, "aria-label": name });
      this.told = element("output", { class: "step" });
      const ticks = element("div", { class: "ticks", "aria-hidden": "true" });
      for (const { step, text, colour } of marks) {
        const share = steps.length > 1 ? steps.indexOf(step) / (steps.length - 1) : 0;
        const side = marks.length < 2 ? "" : step === Math.min(...marks.map((mark) => mark.step)) ? "before" : "after";
        const place = `left: calc(${share} * (100% - 1rem) + .5rem); color: ${colour}`;
        ticks.append(element("span", { style: place, class: side }, text));
      }
      this.button.addEventListener("click", () => this.play(!this.timer));
      this.slider.addEventListener("input", () => {
        this.play(false);
        this.go(Number(this.slider.value));
      });
      this.append(
        element("div", { class: "bar" }, this.button, element("div", { class: "track" }, this.slider, ticks), this.told),
      );
      this.play(false);
    }

    play(on) {
      clearInterval(this.timer);
      this.timer = undefined;
      this.button.textContent = on ? "❚❚ Pause" : "▶ Play";
      if (!on) return;
      if (this.place >= this.steps.length) this.go(1);
      this.timer = setInterval(() => {
        if (this.place >= this.steps.length) this.play(false);
        else this.go(this.place + 1);
      }, 1000 / Math.min(FRAMES_PER_SECOND, Math.max(2, this.steps.length / 4)));
    }

    go(place) {
      this.place = place;
      this.slider.value = place;
      const t = this.steps[place - 1];
      this.slider.setAttribute("aria-valuetext", `step ${t} of ${this.steps.at(-1)}`);
      this.told.textContent = `t = ${t} of ${this.steps.at(-1)}`;
      this.dataset.t = t;
      this.show(place);
    }
  }

  class Player extends Steps {
    async build() {
      const { data } = this;
      this.place = undefined;
      this.dataset.run = data.number;
      this.view = "probability";
      this.append(this.views());
      const panels = element("div", { class: "panels" });
      const [shown, canvas] = figure(data.width, data.height, "the image that the models are shown", "The image");
      if (data.target) shown.querySelector("figcaption").append(element("span", { class: "key" }, "outlined: the target"));
      panels.append(shown);
      this.panels = data.models.map((model, k) => {
        const numbers = element("span", { class: "numbers" });
        const title = element("strong", { style: `color: var(--model-${k})` }, model.name);
        const [drawn, where] = figure(data.width, data.height, `what ${model.name} sees`, title, numbers);
        panels.append(drawn);
        return { canvas: where, numbers };
      });
      this.append(panels);
      if (data.told) this.append(element("p", { class: "note" }, data.told));
      const steps = Array.from({ length: data.steps }, (_, i) => i + 1);
      const same = data.models.every((model) => model.trained === data.models[0].trained);
      const marks = data.models.slice(0, same ? 1 : 2).map((model, k) => ({
        step: model.trained,
        text: `N = ${model.trained}`,
        colour: same ? "inherit" : `var(--model-${k})`,
      }));
      this.bar(steps, marks, "step t");
      this.append(this.charts(), this.maps());
      await this.decode(canvas);
      if (data !== this.data) return; // another run has taken its place meanwhile
      this.go(1);
      for (const late of document.querySelectorAll("crbp-radii")) late.tell?.();
      this.dataset.ready = "true";
      // On a narrow screen it lies below what was pressed.
      if (Player.first !== undefined && innerWidth < 700) this.scrollIntoView({ behavior: calm() ? "auto" : "smooth" });
      Player.first ??= data.number;
      if (!calm()) this.play(true);
    }

    views() {
      const row = element("div", { class: "views", role: "group", "aria-label": "what is drawn over the image" });
      const names = { probability: "Probability", uncertainty: "Uncertainty ε" };
      this.choices = Object.entries(names).map(([view, text]) => {
        const choice = element("button", { type: "button", "aria-pressed": view === this.view }, text);
        choice.addEventListener("click", () => {
          this.view = view;
          for (const each of this.choices) each.setAttribute("aria-pressed", each === choice);
          this.scaleBar();
          this.show(this.place);
        });
        return choice;
      });
      this.scale = element("span", { class: "scale" });
      row.append(...this.choices, this.scale);
      this.scaleBar();
      return row;
    }

    scaleBar() {
      const of = this.view === "probability" ? [0, 1] : this.data.uncertaintyRange;
      const bar = element("i", { style: `background: ${gradient(this.view === "probability" ? "magma" : "viridis")}` });
      this.scale.replaceChildren(String(round(of[0])), bar, String(round(of[1])));
    }

    async decode(canvas) {
      const { data } = this;
      const { width, height } = data;
      const places = this.querySelectorAll(".maps canvas");
      const image = (this.image = grey(await picture(data.image), width, height));
      const target = data.target && grey(await picture(data.target), width, height);
      const edge = (i) => {
        if (!target || target[i]) return false;
        const [x, y] = [i % width, Math.floor(i / width)];
        return [[1, 0], [-1, 0], [0, 1], [0, -1]].some(([dx, dy]) => {
          const inside = x + dx >= 0 && x + dx < width && y + dy >= 0 && y + dy < height;
          return inside && target[i + dx + dy * width];
        });
      };
      paint(canvas, (i) => (edge(i) ? [0, 158, 115] : Array(3).fill(image[i])));
      for (const model of data.models) {
        model.strips = {
          probability: await picture(model.probability),
          uncertainty: await picture(model.uncertainty),
        };
        model.map = grey(await picture(model.reaction), width, height);
      }
      places.forEach((where, k) => {
        paint(where, (i) => VIRIDIS[data.models[k].map[i]]);
      });
    }

    show(t) {
      const { width, height, models } = this.data;
      models.forEach((model, k) => {
        const values = grey(model.strips[this.view], width, height, (t - 1) * height);
        const over = (i) => {
          const share = Math.min(1, values[i] / 128); // where nothing is traced the image shows
          const under = 0.45 * this.image[i];
          return MAGMA[values[i]].map((part) => share * part + (1 - share) * under);
        };
        paint(this.panels[k].canvas, this.view === "probability" ? over : (i) => VIRIDIS[values[i]]);
        this.panels[k].numbers.textContent = model.f1 ? `F1 ${model.f1[t - 1].toFixed(3)}` : "";
        this.panels[k].canvas.classList.toggle("beyond", t > model.trained);
        this.panels[k].canvas.classList.toggle("trained", t === model.trained);
      });
      for (const chart of this.drawn) chart.at(t);
    }

    charts() {
      const { data } = this;
      const curves = (key) => data.models.map((model) => model[key].map((y, i) => [i + 1, y]));
      const unsure = data.models.map((model) => `ξ = ${reaction(model)}`);
      const trained = data.models.map((model) => model.trained);
      const go = (t) => {
        this.play(false);
        this.go(t);
      };
      const common = { last: data.steps, trained, go, names: data.models.map((model) => model.name) };
      this.radius = new Chart("spectral radius ρ(J)", { ...common, level: 1, waits: "being estimated …" });
      this.drawn = [new Chart("residual ‖hₜ − hₜ₋₁‖ / ‖hₜ‖", { ...common, log: true }), this.radius];
      if (data.models[0].f1) this.drawn.push(new Chart("F1", { ...common, low: 0, high: 1 }));
      this.drawn.push(new Chart("mean uncertainty ε", { ...common, notes: unsure }));
      this.drawn[0].draw(curves("residual"));
      if (data.models[0].f1) this.drawn[2].draw(curves("f1"));
      this.drawn.at(-1).draw(curves("meanUncertainty"));
      return element("div", { class: "charts" }, ...this.drawn.map((chart) => chart.figure));
    }

    radii(found, done) {
      this.radius.draw(found.map((points) => points.toSorted((a, b) => a[0] - b[0])), { dots: true, done });
      this.radius.at(this.place);
    }

    maps() {
      const { data } = this;
      const [low, high] = data.reactionRange.map(round);
      const row = element("div", { class: "maps" });
      data.models.forEach((model, k) => {
        const title = element("strong", { style: `color: var(--model-${k})` }, model.name);
        const value = element("span", { class: "numbers" }, `mean ξ ${reaction(model)}`);
        row.append(figure(data.width, data.height, `reaction-time map of ${model.name}`, title, value)[0]);
      });
      const scale = element("p", { class: "scale" }, `${low}`, element("i", { style: `background: ${gradient("viridis")}` }), `${high}`);
      const about = element("div", { class: "about" }, element("h3", {}, "Reaction time ξ"), scale);
      about.append(
        element("p", {}, `The area under ε of each pixel from step 1 to ${data.steps}: large where a model stays unsure for long.`),
      );
      const others = [...new Set(data.models.filter((model) => !model.evidential).map((model) => model.name))];
      if (others.length) {
        about.append(element("p", { class: "note" }, `${others.join(" and ")}: not known to be trained with an evidential loss. ε and ξ then read ` +
          "how large the logits are, and are no measure of doubt to compare with human reaction times."));
      }
      row.append(about);
      return row;
    }
  }

  const reaction = (model) => model.reactionMean?.toPrecision(4) ?? "not finite";
  const round = (value) => Number(value.toPrecision(2));

  // Curves of both models against t, with N, the step shown, and a click to go to a step.
  class Chart {
    constructor(title, settings) {
      Object.assign(this, settings);
      this.width = 320;
      this.height = 170;
      this.box = { left: 46, right: 8, top: 10, bottom: 24 };
      this.svg = svg("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img", "aria-label": title });
      this.values = element("span", { class: "numbers" });
      this.figure = element("figure", {}, element("figcaption", {}, title, this.values), this.svg);
      this.svg.addEventListener("click", (event) => {
        const box = this.svg.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * this.width;
        const inside = (x - this.box.left) / (this.width - this.box.left - this.box.right);
        this.go(Math.min(this.last, Math.max(1, Math.round(1 + inside * (this.last - 1)))));
      });
      this.draw(this.trained.map(() => []), { done: false });
    }

    x(t) {
      const { left, right } = this.box;
      return left + ((t - 1) / Math.max(1, this.last - 1)) * (this.width - left - right);
    }

    y(value) {
      const { top, bottom } = this.box;
      const along = this.log ? Math.log10(value) : value;
      return top + (1 - (along - this.from) / (this.to - this.from)) * (this.height - top - bottom);
    }

    usable(value) {
      return value !== null && (!this.log || value > 0);
    }

    range(curves) {
      const values = curves.flat().map(([, y]) => y).filter((y) => this.usable(y));
      if (this.level !== undefined) values.push(this.level);
      const along = values.map((value) => (this.log ? Math.log10(value) : value));
      const [low, high] = along.length ? [Math.min(...along), Math.max(...along)] : [0, 1];
      const room = this.log ? 0.1 : 0.06 * (high - low || 1);
      this.from = this.low ?? (this.level !== undefined ? Math.min(0.5, low - room) : low - room);
      this.to = this.high ?? high + room;
    }

    draw(curves, { dots = false, done = true } = {}) {
      this.curves = curves;
      this.range(curves);
      const { left, right, top, bottom } = this.box;
      const floor = this.height - bottom;
      this.svg.replaceChildren();
      const line = (a, b, c, d, kind) => this.svg.append(svg("line", { x1: a, y1: b, x2: c, y2: d, class: kind }));
      for (const value of this.scaleMarks()) {
        line(left, this.y(value), this.width - right, this.y(value), "grid");
        this.svg.append(svg("text", { x: left - 4, y: this.y(value) + 3.5, "text-anchor": "end" }, this.marked(value)));
      }
      if (this.level !== undefined) line(left, this.y(this.level), this.width - right, this.y(this.level), "level");
      const wanted = new Set(this.trained);
      this.trained.forEach((n, k) => line(this.x(n), top, this.x(n), floor, `trained model-${wanted.size > 1 ? k : "both"}`));
      for (const t of [1, this.last]) {
        this.svg.append(svg("text", { x: this.x(t), y: this.height - 8, "text-anchor": t === 1 ? "middle" : "end" }, String(t)));
      }
      [...wanted].forEach((n) => {
        this.svg.append(svg("text", { x: this.x(n), y: this.height - 8, "text-anchor": "middle" }, `${n}`));
      });
      curves.forEach((points, k) => this.curve(points.filter(([, y]) => this.usable(y)), k, dots));
      if (this.waits && !done) {
        this.svg.append(svg("text", { x: this.width - right - 4, y: floor - 6, "text-anchor": "end" }, this.waits));
      }
      this.now = svg("line", { y1: top, y2: floor, class: "now" });
      this.svg.append(this.now);
    }

    curve(points, k, dots) {
      const path = points.map(([t, y]) => `${this.x(t)},${this.y(y)}`).join(" ");
      this.svg.append(svg("polyline", { points: path, class: `curve model-${k}${dots ? " thin" : ""}` }));
      if (!dots) return;
      for (const [t, y, converged] of points) {
        const dot = svg("circle", { cx: this.x(t), cy: this.y(y), r: 3.5, class: `dot model-${k}${converged ? "" : " unsure"}` });
        dot.append(svg("title", {}, `${this.names[k]}, t = ${t}: ${y.toPrecision(3)}${converged ? "" : ", not converged"}`));
        this.svg.append(dot);
      }
    }

    scaleMarks() {
      if (this.log) {
        const marks = [];
        const every = Math.max(1, Math.ceil((this.to - this.from) / 5));
        for (let p = Math.ceil(this.from); p <= this.to; p += every) marks.push(10 ** p);
        return marks;
      }
      const span = this.to - this.from;
      const unit = 10 ** Math.floor(Math.log10(span / 3));
      const step = [1, 2, 5, 10].map((k) => k * unit).find((each) => span / each <= 5);
      const marks = [];
      for (let v = Math.ceil(this.from / step) * step; v <= this.to + 1e-9; v += step) marks.push(Number(v.toPrecision(6)));
      return marks;
    }

    marked(value) {
      if (!this.log) return String(value);
      const power = Math.round(Math.log10(value));
      return power === 0 ? "1" : `10${[...String(power)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
    }

    at(t) {
      this.now.setAttribute("x1", this.x(t));
      this.now.setAttribute("x2", this.x(t));
      this.values.replaceChildren(
        ...this.curves.map((points, k) => {
          const found = points.filter(([step, y]) => step <= t && y !== null).at(-1);
          const number = found ? (found[1] < 0.01 && found[1] > 0 ? found[1].toExponential(0) : String(Number(found[1].toPrecision(3)))) : "";
          return element("span", { style: `color: var(--model-${k})` }, this.notes ? `${this.notes[k]}` : number);
        }),
      );
    }
  }

  // What comes in after a player was shown: told to the player of the same run.
  class Radii extends HTMLElement {
    static observedAttributes = ["data-show"];

    attributeChangedCallback() {
      this.tell();
    }

    tell() {
      const { number, found, done } = JSON.parse(this.dataset.show);
      const player = document.querySelector(`crbp-player[data-run="${number}"]`);
      if (player?.place) player.radii(found, done);
    }
  }

  // Whole pictures, one a step.
  class Frames extends Steps {
    build() {
      const { data } = this;
      this.image = element("img", { alt: "" });
      this.caption = element("figcaption");
      this.append(element("figure", { class: "whole" }, this.image, this.caption));
      const steps = data.frames.map((frame) => frame.t);
      const marks = steps.includes(data.trained) ? [{ step: data.trained, text: `N = ${data.trained}`, colour: "inherit" }] : [];
      this.bar(steps, marks, "step t of the mask head");
      this.go(1);
      this.dataset.ready = "true";
      if (!calm()) this.play(true);
    }

    show(place) {
      const frame = this.data.frames[place - 1];
      this.image.src = frame.source;
      this.image.alt = `panoptic segments after ${frame.t} steps: ${frame.told}`;
      this.caption.textContent = frame.told;
    }
  }

  // Draw with a pointer, or with the keyboard: arrows move the pencil, space puts it down and lifts it.
  class Pad extends HTMLElement {
    connectedCallback() {
      if (this.canvas) return;
      this.strokes = [];
      this.pencil = [0.5, 0.5];
      const about = "Drawing pad. Arrow keys move the pencil, shift makes it faster, space puts it down and lifts it, " +
        "backspace takes the last stroke back.";
      this.canvas = element("canvas", { width: 480, height: 480, tabindex: 0, role: "application", "aria-label": about });
      const undo = element("button", { type: "button" }, "Undo");
      const clear = element("button", { type: "button" }, "Clear");
      undo.addEventListener("click", () => this.take(this.strokes.slice(0, -1)));
      clear.addEventListener("click", () => this.take([]));
      this.append(this.canvas, element("div", { class: "tools" }, undo, clear));
      this.canvas.addEventListener("pointerdown", (event) => this.start(event));
      this.canvas.addEventListener("pointermove", (event) => this.drag(event));
      for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => this.lift());
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      for (const change of ["focus", "blur"]) this.canvas.addEventListener(change, () => this.draw());
      this.draw();
    }

    get json() {
      return JSON.stringify(this.strokes.map((stroke) => stroke.map((point) => point.map((v) => Number(v.toFixed(4))))));
    }

    place(event) {
      const box = this.canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((v) => Math.min(1, Math.max(0, v)));
    }

    start(event) {
      this.byKeys = false;
      this.canvas.setPointerCapture(event.pointerId);
      this.stroke = [this.place(event)];
      this.strokes.push(this.stroke);
      this.draw();
    }

    drag(event) {
      if (!this.stroke || this.byKeys) return;
      const [x, y] = this.place(event);
      const [px, py] = this.stroke.at(-1);
      if (Math.hypot(x - px, y - py) > 0.006) this.stroke.push([x, y]);
      this.draw();
    }

    lift() {
      this.stroke = undefined;
      this.draw();
    }

    key(event) {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const move = moves[event.key];
      if (!move && event.key !== " " && event.key !== "Backspace") return;
      event.preventDefault();
      this.byKeys = true;
      if (event.key === "Backspace") return this.take(this.strokes.slice(0, -1));
      if (event.key === " ") {
        this.stroke = this.stroke ? undefined : [[...this.pencil]];
        if (this.stroke) this.strokes.push(this.stroke);
      } else {
        this.pencil = this.pencil.map((v, axis) => Math.min(1, Math.max(0, v + move[axis] * (event.shiftKey ? 0.06 : 0.02))));
        this.stroke?.push([...this.pencil]);
      }
      this.draw();
    }

    take(strokes) {
      this.strokes = strokes;
      this.stroke = undefined;
      this.draw();
    }

    draw() {
      const context = this.canvas.getContext("2d");
      const side = this.canvas.width;
      context.fillStyle = "#000";
      context.fillRect(0, 0, side, side);
      const keys = document.activeElement === this.canvas && this.byKeys !== false;
      if (!this.strokes.length) {
        context.fillStyle = "#9ca3af";
        context.font = "22px system-ui, sans-serif";
        context.textAlign = "center";
        context.fillText("Draw a line: the contour to trace.", side / 2, side / 2 - 40);
        context.fillText("Further lines are distractors.", side / 2, side / 2 + 50);
      }
      Object.assign(context, { strokeStyle: "#fff", fillStyle: "#fff", lineWidth: 13, lineCap: "butt", lineJoin: "round" });
      this.strokes.forEach((stroke, k) => {
        context.setLineDash([20, 10]);
        context.beginPath();
        stroke.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x * side, y * side));
        context.stroke();
        if (k > 0) return;
        context.beginPath();
        context.arc(stroke[0][0] * side, stroke[0][1] * side, 24, 0, 2 * Math.PI);
        context.fill();
      });
      if (!keys) return;
      context.setLineDash([]);
      Object.assign(context, { strokeStyle: this.stroke ? "#e69f00" : "#56b4e9", lineWidth: 4 });
      context.beginPath();
      context.arc(this.pencil[0] * side, this.pencil[1] * side, 12, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  customElements.define("crbp-player", Player);
  customElements.define("crbp-radii", Radii);
  customElements.define("crbp-frames", Frames);
  customElements.define("crbp-pad", Pad);
})();
