// A pad to draw a digit on, and ten bars that show what the network reads: the front end of the class Pad
// in mnist.ipynb. The ink goes to Python as you draw. The probabilities, and what the network sees, come back.

const SIDE = 280; // width and height of the paper, in pixels of the page
const SENT = 112; // width and height of what is sent, in points: fine enough for a digit, and quick to send
const STEP = 7; // how far an arrow key moves the pen
const SMALLEST = 60; // the height or width of a digit that can be read: the pen is too thick for smaller ones

const STYLE = `
.pad { display: flex; flex-wrap: wrap; gap: 1.5em; max-width: 44em; padding: 4px; font-size: 14px;
  color: var(--jp-ui-font-color1, inherit); }
.pad .sheet { position: relative; width: ${SIDE}px; height: ${SIDE}px; }
.pad .paper { background: white; outline: 1px solid gray; cursor: crosshair; touch-action: none; }
.pad .paper:focus-visible { outline: 3px solid #1f77b4; }
.pad .pen { position: absolute; width: 20px; height: 20px; margin: -12px; border: 2px solid #d62728; border-radius: 50%;
  pointer-events: none; visibility: hidden; }
.pad .paper:focus-visible + .pen { visibility: visible; }
.pad .seen { width: 84px; height: 84px; background: white; image-rendering: pixelated; outline: 1px solid gray; }
.pad .bars { flex: 1 1 15em; max-width: 24em; }
.pad .guess { font-size: 18px; font-weight: bold; margin: 0 0 .5em; }
.pad .row { display: grid; grid-template-columns: 1em 1fr 3.5em; gap: .6em; align-items: center; line-height: 1.6; }
.pad .track { height: .9em; border: 1px solid gray; }
.pad .bar { height: 100%; background: #1f77b4; }
.pad .percent { text-align: right; font-variant-numeric: tabular-nums; }
.pad .more { display: flex; align-items: center; gap: 1em; margin-top: .8em; }
.pad button { font: inherit; padding: .4em 1.2em; }
.pad .help { margin: .8em 0 0; max-width: ${SIDE}px; line-height: 1.4; }
`;

const HTML = `
<div class="pad" data-lm-suppress-shortcuts="true">
  <div>
    <div class="sheet">
      <canvas class="paper" width="${SIDE}" height="${SIDE}" tabindex="0" role="application"
        aria-label="Drawing pad. Draw a digit with the mouse, a finger or the arrow keys; the space bar lowers and lifts the pen"></canvas>
      <div class="pen"></div>
    </div>
    <p class="help">Draw here with the mouse, a finger or the arrow keys. The space bar lowers and lifts the pen for the
      arrow keys. The Delete key clears the pad.</p>
  </div>
  <div class="bars">
    <p class="guess" role="status"></p>
    ${[...Array(10).keys()].map((digit) => `<div class="row">${digit}<div class="track"><div class="bar"></div></div>
      <span class="percent"></span></div>`).join("")}
    <div class="more">
      <button type="button">Clear</button>
      <canvas class="seen" width="28" height="28" role="img" aria-label="The drawing as the network sees it"></canvas>
      <span>what the network sees</span>
    </div>
  </div>
</div>`;

function render({ model, el }) {
  el.innerHTML = `<style>${STYLE}</style>${HTML}`;
  const find = (selector) => el.querySelector(selector);
  const paper = find(".paper");
  const ink = paper.getContext("2d");
  const small = new OffscreenCanvas(SENT, SENT).getContext("2d", { willReadFrequently: true });
  Object.assign(ink, { lineWidth: 20, lineCap: "round", lineJoin: "round" });
  const pen = { down: false }; // x and y are set by move
  let drawn = { x: [], y: [] }; // the places where the pen was down

  function send() {
    small.clearRect(0, 0, SENT, SENT);
    small.drawImage(paper, 0, 0, SENT, SENT);
    const opacity = small.getImageData(0, 0, SENT, SENT).data.filter((_, i) => i % 4 === 3);
    model.set("ink", new DataView(opacity.buffer));
    model.save_changes(); // waits by itself while Python is still busy with the last drawing
  }

  function move(x, y) {
    if (pen.down) {
      ink.beginPath();
      ink.moveTo(pen.x, pen.y);
      ink.lineTo(x + 0.01, y); // a line of no length at all would leave no dot
      ink.stroke();
      drawn.x.push(pen.x, x);
      drawn.y.push(pen.y, y);
      send();
      say();
    }
    Object.assign(pen, { x, y });
    Object.assign(find(".pen").style, { left: `${x}px`, top: `${y}px` });
  }

  function clear() {
    ink.clearRect(0, 0, SIDE, SIDE);
    pen.down = false;
    drawn = { x: [], y: [] };
    move(SIDE / 2, SIDE / 2);
    send();
  }

  paper.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    paper.setPointerCapture(event.pointerId);
    Object.assign(pen, { x: event.offsetX, y: event.offsetY, down: true });
    move(pen.x, pen.y); // a dot
  });
  paper.addEventListener("pointermove", (event) => {
    if (event.buttons && event.isPrimary) move(event.offsetX, event.offsetY);
  });
  for (const end of ["pointerup", "pointercancel"]) paper.addEventListener(end, () => (pen.down = false));
  paper.addEventListener("keydown", (event) => {
    const clamp = (place) => Math.max(0, Math.min(SIDE, place));
    const steps = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP], " ": [0, 0] };
    if (event.key === "Delete") clear();
    if (!(event.key in steps)) return;
    event.preventDefault(); // or the key would scroll the page
    if (event.key === " ") pen.down = !pen.down;
    const [right, down] = steps[event.key];
    move(clamp(pen.x + right), clamp(pen.y + down));
  });
  find("button").addEventListener("click", clear);

  function say() {
    const probabilities = model.get("probabilities");
    const size = Math.max(...[drawn.x, drawn.y].map((places) => Math.max(...places) - Math.min(...places)));
    let words = `It reads a ${probabilities.indexOf(Math.max(...probabilities))}.`;
    if (!probabilities.length) words = "Nothing to read yet.";
    else if (drawn.x.length && size < SMALLEST) words = "Write larger, please.";
    find(".guess").textContent = words;
  }

  function update() {
    const probabilities = model.get("probabilities");
    const best = Math.max(...probabilities);
    el.querySelectorAll(".row").forEach((row, digit) => {
      const percent = `${Math.round(100 * (probabilities[digit] ?? 0))} %`;
      row.querySelector(".bar").style.width = percent.replace(" ", "");
      row.querySelector(".percent").textContent = percent;
      row.style.fontWeight = probabilities[digit] === best ? "bold" : "normal";
    });
    say();
    const image = new ImageData(28, 28);
    const seen = model.get("seen");
    for (let i = 0; i < seen.byteLength; i++) image.data[4 * i + 3] = seen.getUint8(i);
    find(".seen").getContext("2d").putImageData(image, 0, 0);
  }
  model.on("change:probabilities", update);
  update();
  move(SIDE / 2, SIDE / 2);
  return () => model.off("change:probabilities", update);
}

export default { render };
