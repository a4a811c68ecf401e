// Both lanes of an answer, as its trace tells them: when which worker computed, and what it brought.

const MOST = 4000; // spans that are kept
const GUTTER = 58; // pixels for the lanes' names
const PASS = 18; // pixels that a pass of the target is to have at least
const JOINED_S = 0.004; // drafting steps closer than this are one stretch
const WINDOWS = [2, 4, 8, 16, 32, 64]; // seconds that are shown
const TOP = 10;
const LANE = 26;
const CELL = 6;
const MOST_CELLS = 9;
const Y = { draft: TOP, target: TOP + LANE + 8, brought: TOP + 2 * LANE + 18 };
const HEIGHT = Y.brought + MOST_CELLS * (CELL + 1) + 4;

/** Draws on `canvas`; times are the coordinator's, whose clock is guessed from when they come. */
export class Lanes {
  back = 0; // seconds between the end of what is shown and the end of what there is
  #spans = [];
  #gaps = []; // without a draft: {from, to}, in this page's time
  #offset = Infinity; // of this page's clock before the coordinator's
  #live = false;
  #shown_s = WINDOWS[0]; // from the left to the right
  #waits = false; // a frame is asked for
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(canvas) {
    this.canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Another answer begins: what was before is of no interest any more. */
  begin() {
    this.#spans = [];
    this.#gaps = this.#gaps.filter((gap) => gap.to === undefined);
    this.#live = true;
    this.back = 0;
    this.draw();
  }

  /** Spans that have come, and the kinds of the tokens that the last pass brought. */
  add(spans, tokens) {
    for (const span of spans) {
      const last = this.#spans.findLast((one) => one.lane === span.lane);
      this.#offset = Math.min(this.#offset, performance.now() / 1000 - span.end);
      if (span.lane === "draft" && last?.number === span.number && span.start - last.end < JOINED_S) {
        last.end = span.end;
        last.rows += span.rows;
      } else {
        const anew = span.lane === "draft" && last !== undefined && last.number !== span.number;
        this.#spans.push({ ...span, anew, brought: [] });
      }
    }
    const pass = this.#spans.findLast((one) => one.lane === "target");
    if (pass) pass.brought.push(...tokens.map((token) => token.kind));
    this.#spans.splice(0, this.#spans.length - MOST);
    this.#ask();
  }

  end() {
    this.#live = false;
    this.draw();
  }

  /** There is no draft worker, for so many seconds at most: what it drafted was before. */
  lost(most_s) {
    const last = this.#spans.findLast((span) => span.lane === "draft");
    const drafted = last ? last.end + this.#offset : 0;
    this.#gaps.push({ from: Math.max(performance.now() / 1000 - most_s, drafted) });
    this.#ask();
  }

  /** There is one again. */
  found() {
    for (const gap of this.#gaps) gap.to ??= performance.now() / 1000;
    this.#ask();
  }

  /** Seconds that lie before what is shown while the answer has ended. */
  get past() {
    if (!this.#spans.length) return 0;
    return Math.max(0, this.#end() - this.#spans[0].start - this.#window());
  }

  get #width() {
    return Math.max(1, this.canvas.clientWidth - GUTTER);
  }

  #end() {
    const last = Math.max(0, ...this.#spans.slice(-2 * MOST_CELLS).map((span) => span.end));
    return this.#live ? Math.max(last, performance.now() / 1000 - this.#offset) : last;
  }

  /** So many that a pass can be seen: the middle one of the last, without reading the prompt. */
  #window() {
    const passes = this.#spans.filter((span) => span.lane === "target" && span.number).slice(-31);
    if (!passes.length) return this.#shown_s;
    const lengths = passes.map((span) => span.end - span.start).sort((a, b) => a - b);
    const middle = lengths[lengths.length >> 1];
    const pixels = (middle / this.#shown_s) * this.#width;
    if (pixels < PASS / 2 || pixels > 5 * PASS) { // else it stays: a picture that jumps is not calm
      const fits = (one) => (middle / one) * this.#width >= PASS;
      this.#shown_s = WINDOWS.findLast(fits) ?? WINDOWS[0];
    }
    return this.#shown_s;
  }

  #ask() {
    if (this.#waits) return;
    this.#waits = true;
    const drawn = () => {
      this.#waits = false;
      this.draw();
      if (this.#live) this.#ask();
    };
    if (this.#calm.matches) setTimeout(drawn, 500);
    else requestAnimationFrame(drawn);
  }

  draw() {
    const context = this.#cleared();
    const colour = colours();
    const window_s = this.#window();
    const end = (this.#spans.length ? this.#end() : 0) - this.back;
    const x = (time) => GUTTER + this.#width * (1 - (end - time) / window_s);
    frame(context, colour, this.#width, window_s);
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, this.#width, HEIGHT);
    context.clip();
    if (this.#spans.length) {
      for (const gap of this.#gaps) {
        const to = gap.to === undefined ? end : gap.to - this.#offset;
        missing(context, colour, x(gap.from - this.#offset), x(to));
      }
    }
    for (const span of this.#spans) {
      if (span.end > end - window_s && span.start < end) bar(context, colour, span, x);
    }
    context.restore();
  }

  #cleared() {
    const ratio = devicePixelRatio;
    const [width, height] = [this.canvas.clientWidth * ratio, HEIGHT * ratio].map(Math.round);
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, HEIGHT);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    return context;
  }
}

/** The colours of the style sheet, light or dark. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["quiet", "line", "ground", "drafted", "corrected", "bonus", "plain", "target"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

function frame(context, colour, width, window_s) {
  context.fillStyle = colour.quiet;
  for (const lane of ["draft", "target"]) {
    context.fillText(lane, 0, Y[lane] + LANE / 2);
    context.globalAlpha = 0.25;
    context.fillRect(GUTTER, Y[lane] + LANE - 1, width, 1);
    context.globalAlpha = 1;
  }
  context.fillText("brought", 0, Y.brought + 5);
  context.fillText(`${window_s} s`, 0, HEIGHT - 8);
}

function bar(context, colour, span, x) {
  const [left, y] = [x(span.start), Y[span.lane]];
  const width = Math.max(1, x(span.end) - left - 1);
  const isTarget = span.lane === "target";
  context.fillStyle = isTarget ? colour.target : colour.drafted;
  context.beginPath();
  context.roundRect(left, y, width, LANE, Math.min(4, width / 2));
  context.fill();
  if (width > 16) {
    context.fillStyle = colour.ground;
    context.textAlign = "center";
    context.fillText(span.rows, left + width / 2, y + LANE / 2 + 1);
    context.textAlign = "start";
  }
  if (span.anew) {
    context.fillStyle = colour.corrected;
    context.fillRect(left - 1, y - 6, 2, 9);
  }
  const shown = span.brought.length > MOST_CELLS ? span.brought.slice(-MOST_CELLS) : span.brought;
  shown.forEach((kind, n) => cell(context, colour[kind], kind, left + width, n));
}

/** A token, in a form of its own: not everybody sees the colours. */
function cell(context, colour, kind, right, n) {
  const [left, top] = [right - CELL, Y.brought + n * (CELL + 1)];
  context.fillStyle = context.strokeStyle = colour;
  context.beginPath();
  if (kind === "drafted") context.rect(left, top, CELL, CELL);
  else if (kind === "bonus") context.arc(left + 3, top + 3, 3, 0, 7);
  else if (kind === "plain") context.rect(left, top + 2, CELL, 2);
  else {
    context.rect(left + 0.75, top + 0.75, CELL - 1.5, CELL - 1.5);
    context.lineWidth = 1.5;
    context.stroke();
    return;
  }
  context.fill();
}

function missing(context, colour, from, to) {
  context.save();
  context.beginPath();
  context.rect(from, Y.draft, to - from, LANE);
  context.clip();
  context.strokeStyle = colour.corrected;
  context.globalAlpha = 0.5;
  context.beginPath();
  for (let x = from - LANE - (from % 8); x < to; x += 8) {
    context.moveTo(x, Y.draft + LANE);
    context.lineTo(x + LANE, Y.draft);
  }
  context.stroke();
  context.globalAlpha = 1;
  const left = Math.max(from, GUTTER) + 6;
  if (to - left > 60) {
    context.fillStyle = colour.ground;
    context.fillRect(left - 4, Y.draft + 5, 54, LANE - 10);
    context.fillStyle = colour.corrected;
    context.fillText("no draft", left, Y.draft + LANE / 2);
  }
  context.restore();
}
