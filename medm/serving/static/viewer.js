/* Draws what the elements `.medm-viewer` of a page describe (medm/serving/playground_viewer.py):
   an image on a canvas or a volume by NiiVue, masks over it, and the findings of a reply. */
"use strict";
(() => {
  const WINDOWS = [
    // name, level, width in HU
    ["Lung", -600, 1500],
    ["Soft tissue", 40, 400],
    ["Bone", 400, 1800],
  ];
  const OPACITY = 0.5;
  const DIMMED = 0.2;
  const GRAY = 90;
  const RENDER_NEVER = 0;
  const DRAG_WINDOW = 1;
  const scenes = new Map(); // name of a viewer to what it shows; outlives its element

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text; // never HTML: phrases are text of a model
    return made;
  }

  function absolute(url) {
    return new URL(url, document.baseURI).href;
  }

  class ImageScene {
    constructor() {
      this.canvas = element("canvas");
    }

    async show(view) {
      const load = async (url) => {
        const image = new Image();
        image.src = absolute(url);
        await image.decode();
        return image;
      };
      this.base = await load(view.url);
      this.masks = await Promise.all(view.findings.map((finding) => load(finding.url)));
      this.canvas.width = view.width;
      this.canvas.height = view.height;
    }

    draw(findings, shown, selected) {
      const context = this.canvas.getContext("2d");
      context.globalAlpha = 1;
      context.drawImage(this.base, 0, 0);
      this.masks.forEach((mask, number) => {
        if (!shown[number]) return;
        context.globalAlpha = selected === null || selected === number ? OPACITY : DIMMED;
        context.drawImage(mask, 0, 0);
      });
    }

    focus() {}
  }

  class VolumeScene {
    constructor() {
      this.canvas = element("canvas");
      this.url = null;
    }

    async show(view) {
      if (!this.nv) {
        this.nv = new niivue.Niivue({
          backColor: [0, 0, 0, 1],
          crosshairColor: [0.9, 0.8, 0.1, 0.5],
          crosshairWidth: 0.5,
          dragMode: DRAG_WINDOW,
          isRadiologicalConvention: true, // the patient's left is on the right, as in reports
          multiplanarShowRender: RENDER_NEVER,
          show3Dcrosshair: false,
          logLevel: "error",
        });
        await this.nv.attachToCanvas(this.canvas);
        this.nv.setSliceType(this.nv.sliceTypeMultiplanar);
      }
      const overlay = view.labels
        ? [{ url: absolute(view.labels), name: "labels.nii.gz", opacity: OPACITY }]
        : [];
      const [low, high] = this.url === view.url ? this.window() : view.window;
      await this.nv.loadVolumes([
        { url: absolute(view.url), name: "volume.nii.gz", colormap: "gray", cal_min: low, cal_max: high },
        ...overlay,
      ]);
      this.nv.setIsOrientationTextVisible(view.oriented);
      this.url = view.url;
    }

    window() {
      return [this.nv.volumes[0].cal_min, this.nv.volumes[0].cal_max];
    }

    setWindow(low, high) {
      this.nv.volumes[0].cal_min = low;
      this.nv.volumes[0].cal_max = high;
      this.nv.updateGLVolume();
    }

    draw(findings, shown, selected) {
      if (this.nv.volumes.length < 2) return;
      const map = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
      findings.forEach((finding, number) => {
        const strong = selected === null || selected === number;
        // NiiVue shows any alpha of a label in full, so that the others are grayed instead.
        const part = (value) => (strong ? value : Math.round(GRAY + (value - GRAY) * DIMMED));
        const [red, green, blue] = finding.color.map(part);
        map.R.push(red);
        map.G.push(green);
        map.B.push(blue);
        map.A.push(shown[number] ? 255 : 0);
        map.I.push(number + 1);
        map.labels.push(finding.phrase);
      });
      this.nv.volumes[1].setColormapLabel(map);
      this.nv.opts.showLegend = false;
      this.nv.updateGLVolume();
    }

    focus(finding) {
      if (!finding.center) return;
      this.nv.scene.crosshairPos = this.nv.mm2frac(finding.center);
      this.nv.createOnLocationChange();
      this.nv.drawScene();
    }
  }

  function windowBar(scene, view) {
    const bar = element("div", "medm-bar");
    const level = element("input");
    const width = element("input");
    const put = (low, high) => {
      level.value = Number(((low + high) / 2).toPrecision(5));
      width.value = Number((high - low).toPrecision(5));
    };
    const apply = (low, high) => {
      put(low, high);
      scene.setWindow(low, high);
    };
    const preset = (name, low, high, title) => {
      const button = element("button", "medm-window", name);
      button.type = "button";
      button.title = title;
      button.onclick = () => apply(low, high);
      bar.append(button);
    };
    bar.append(element("span", "", "Window"));
    for (const [name, center, size] of WINDOWS) {
      preset(name, center - size / 2, center + size / 2, `CT: level ${center} HU, width ${size} HU`);
    }
    preset("Auto", view.window[0], view.window[1], "Percentiles 1 to 99 of the volume");
    for (const [input, name] of [[level, "Level"], [width, "Width"]]) {
      const label = element("label", "", `${name} `);
      input.type = "number";
      input.className = `medm-${name.toLowerCase()}`;
      input.onchange = () => {
        const center = Number(level.value);
        const size = Math.max(Number(width.value), 1e-3);
        scene.setWindow(center - size / 2, center + size / 2);
      };
      label.append(input);
      bar.append(label);
    }
    bar.append(element("span", "medm-size", view.unit === "HU" ? "HU" : "values of the file"));
    put(...scene.window());
    scene.nv.onIntensityChange = () => put(...scene.window());
    return bar;
  }

  function findingsList(host, scene, view) {
    const shown = view.findings.map(() => true);
    let selected = null;
    const list = element("ul", "medm-findings");
    const update = () => {
      [...list.children].forEach((row, number) => {
        row.classList.toggle("medm-selected", number === selected);
      });
      host.dataset.selected = selected === null ? "" : view.findings[selected].phrase;
      scene.draw(view.findings, shown, selected);
    };
    view.findings.forEach((finding, number) => {
      const row = element("li");
      const box = element("input");
      box.type = "checkbox";
      box.checked = true;
      box.title = "Show the mask";
      box.setAttribute("aria-label", `Show the mask of ${finding.phrase}`);
      box.onchange = () => {
        shown[number] = box.checked;
        update();
      };
      const swatch = element("span", "medm-swatch");
      swatch.style.background = `rgb(${finding.color.join(",")})`;
      const name = element("button", "", finding.phrase);
      name.type = "button";
      name.title = "Highlight the mask";
      name.onclick = () => {
        selected = selected === number ? null : number;
        update();
        if (selected !== null) scene.focus(finding);
      };
      row.append(box, swatch, name, element("span", "medm-size", finding.size));
      list.append(row);
    });
    update();
    return list;
  }

  async function build(host) {
    const view = JSON.parse(host.dataset.view);
    const state = element("div", "medm-empty", "No image or volume yet");
    host.replaceChildren(state);
    if (view === null) {
      host.dataset.ready = "empty";
      return;
    }
    state.textContent = "Loading ...";
    const key = `${host.dataset.name}/${view.kind}`;
    if (!scenes.has(key)) scenes.set(key, view.kind === "image" ? new ImageScene() : new VolumeScene());
    const scene = scenes.get(key);
    const stage = element("div", `medm-stage medm-${view.kind}`);
    stage.append(scene.canvas);
    host.replaceChildren(stage); // NiiVue measures its canvas
    try {
      await scene.show(view);
    } catch (error) {
      host.replaceChildren(element("div", "medm-empty", `The viewer cannot show it: ${error.message}`));
      host.dataset.ready = "failed";
      return;
    }
    if (view.kind === "volume") host.append(windowBar(scene, view));
    if (view.findings.length) host.append(element("div", "medm-title", "Findings of the reply"));
    const list = findingsList(host, scene, view);
    if (view.findings.length) host.append(list);
    host.dataset.ready = view.kind;
  }

  let running = Promise.resolve();
  function scan() {
    for (const host of document.querySelectorAll(".medm-viewer")) {
      if (host.builtFrom === host.dataset.view) continue;
      host.builtFrom = host.dataset.view;
      delete host.dataset.ready;
      running = running.then(() => build(host));
    }
  }

  new MutationObserver(scan).observe(document.documentElement, {
    attributeFilter: ["data-view"],
    childList: true,
    subtree: true,
  });
  scan();
})();
