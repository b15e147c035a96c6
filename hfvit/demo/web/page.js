// User interface of the page. The model runs in worker.js.

const element = (id) => document.getElementById(id);
const [file, drop, preview, status, results] = ["file", "drop", "preview", "status", "results"].map(element);
const [explainButton, explained] = ["explain", "explained"].map(element);
const [gauge, fill, answer, camera, video, shoot] = ["gauge", "fill", "answer", "camera", "video", "shoot"].map(element);

element("needs-server").remove(); // modules do not run from file://, where the notice stays
const base = new URL(".", location.href).href;
let worker;
let isReady = false;
let current = 0; // id of the image that is shown; answers for older images are ignored
let waiting = null;

function say(text, kind = "") {
  status.replaceChildren(...[text].flat());
  status.className = kind;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

const replies = {
  progress({ loaded, total }) {
    fill.style.transform = `scaleX(${loaded / total})`;
    gauge.setAttribute("aria-valuenow", Math.round((100 * loaded) / total));
    const isLoaded = loaded >= total;
    say(isLoaded ? "Starting the model…" : `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`);
  },
  ready() {
    isReady = true;
    gauge.hidden = true;
    say("Ready. Choose an image.");
    document.body.dataset.state = "ready";
    if (waiting) ask(waiting);
  },
  failed({ text }) {
    gauge.hidden = true;
    say(`The model could not be loaded: ${text}`, "error");
    document.body.dataset.state = "failed";
  },
  answer({ id, best, isUnlike, milliseconds, seen, size }) {
    if (id !== current) return;
    showBars(best);
    element("unlike").hidden = !isUnlike;
    element("confidence").hidden = false;
    [explainButton.disabled, explained.textContent] = [false, ""];
    showSeen(seen);
    element("time").textContent = `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
    element("given").textContent = size.join(" × ");
    answer.hidden = false;
    say(summary(best), "done");
    document.body.dataset.state = "answered";
  },
  explaining({ id, part }) {
    if (id === current) explained.textContent = `Hiding parts of the image: ${Math.round(100 * part)} %`;
  },
  explained({ id, seen, label }) {
    if (id !== current) return;
    showSeen(seen);
    explained.replaceChildren("Orange: hiding this part makes “", isolated(label), "” less probable (occlusion).");
    document.body.dataset.state = "explained";
  },
  refused({ id, text }) {
    if (id === current) refuse(text);
  },
};

/** Keep a name in another writing direction apart from the text around it. */
function isolated(name) {
  const part = document.createElement("bdi");
  part.textContent = name;
  return part;
}

/** The most probable class, or with several labels those that reach their thresholds. */
function summary(best) {
  if (best[0].found === undefined) return [isolated(best[0].label), `, ${percent(best[0].probability)}`];
  const names = best.filter(({ found }) => found).flatMap(({ label }) => [", ", isolated(label)]);
  return names.length ? names.slice(1) : "None of its classes";
}

function refuse(text) {
  clear();
  preview.hidden = true;
  say(text, "error");
  document.body.dataset.state = "refused";
}

function clear() {
  results.replaceChildren();
  answer.hidden = element("unlike").hidden = element("confidence").hidden = true;
}

function percent(fraction) {
  if (fraction > 0 && fraction < 0.0005) return "<0.1%";
  return new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(fraction);
}

function showBars(best) {
  results.replaceChildren(
    ...best.map(({ label, probability, found }) => {
      const row = document.createElement("li");
      row.dataset.probability = probability;
      if (found !== undefined) row.dataset.found = found;
      const [name, probabilityText, bar] = ["name", "probability", "bar"].map((kind) => {
        const part = document.createElement("span");
        part.className = kind;
        return part;
      });
      name.textContent = label;
      name.dir = "auto";
      probabilityText.textContent = percent(probability);
      bar.append(document.createElement("i"));
      row.append(name, probabilityText, bar);
      // after the first paint, so that the bar is animated
      requestAnimationFrame(() => requestAnimationFrame(() => (bar.firstChild.style.transform = `scaleX(${probability})`)));
      return row;
    }),
  );
}

function showSeen({ data, width, height }) {
  const canvas = element("seen");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
}

/** Show an image and classify it, after the model is loaded. */
function showAndClassify(image) {
  if (!image) return;
  current += 1;
  clear();
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.hidden = false;
  document.body.dataset.state = "asked";
  if (isReady) ask(image);
  else waiting = image;
}

function ask(image) {
  waiting = null;
  say("Classifying…");
  worker.postMessage({ kind: "classify", id: current, image });
}

function imageIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((one) => one.type.startsWith("image/")) ?? files[0];
}

preview.addEventListener("error", () => (preview.hidden = true));
file.addEventListener("change", () => {
  showAndClassify(file.files[0]);
  file.value = ""; // so that choosing the same file again is a change
});
addEventListener("paste", (event) => showAndClassify(imageIn(event.clipboardData)));
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? drop.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const image = imageIn(event.dataTransfer);
  if (image) showAndClassify(image);
  else refuse("Only files can be dropped. Save the image, then drop the file here.");
});
for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", async () => showAndClassify(await (await fetch(example.firstElementChild.src)).blob()));
}

explainButton.addEventListener("click", () => {
  explainButton.disabled = true;
  worker.postMessage({ kind: "explain", id: current });
});

if (navigator.mediaDevices?.getUserMedia) camera.hidden = false;
camera.addEventListener("click", async () => {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    say(`The camera cannot be used: ${error.message}`, "error");
    return;
  }
  element("viewfinder").showModal();
});
element("viewfinder").addEventListener("close", () => {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
});
shoot.addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((image) => {
    element("viewfinder").close();
    showAndClassify(image);
  });
});

/** Start the worker from a blob, since a worker from a file does not inherit the Content-Security-Policy. */
function startWorker() {
  const source = new Blob([`import ${JSON.stringify(`${base}worker.js`)};`], { type: "text/javascript" });
  const started = new Worker(URL.createObjectURL(source), { type: "module" });
  started.onmessage = ({ data }) => replies[data.kind](data);
  started.onerror = (event) => replies.failed({ text: event.message || "this browser cannot run its script" });
  return started;
}

try {
  const answered = await fetch("page.json", { cache: "no-cache" });
  if (!answered.ok) throw new Error(`page.json: ${answered.status} ${answered.statusText}`);
  worker = startWorker();
  worker.postMessage({ kind: "start", page: await answered.json(), base });
} catch (error) {
  replies.failed({ text: error.message });
}
