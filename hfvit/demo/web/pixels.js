// Image preprocessing, with the same result as the image processor in Python.
//
// transformers.js resizes on a canvas, without the antialiasing filter that the model was trained with. This is
// Pillow's arithmetic (src/libImaging/Resample.c), so that the input equals that of the evaluation.

const BITS = 22; // precision of the fixed-point weights

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's resample number -> [half width of the filter, filter].
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, bicubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)], // box
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)], // Hamming
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** For each of `to` output pixels: [first input pixel, weights of the pixels from there on]. */
function resamplingWeights(from, to, resample) {
  const scale = from / to;
  if (resample === 0) {
    return Array.from({ length: to }, (_, index) => [Math.floor((index + 0.5) * scale), [1 << BITS]]);
  }
  const stretch = Math.max(1, scale);
  const [halfWidth, filter] = FILTERS[resample];
  const support = halfWidth * stretch;
  return Array.from({ length: to }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const values = [];
    for (let input = first; input < end; input++) values.push(filter((input - center + 0.5) / stretch));
    const sum = values.reduce((total, value) => total + value, 0);
    return [first, values.map((value) => Math.trunc((value / sum) * 2 ** BITS + Math.sign(value) * 0.5))];
  });
}

/**
 * Resize along one axis of 8-bit RGBA pixels.
 *
 * There are `lines` lines, `lineStep` bytes apart, whose pixels are `pixelStep` bytes apart; `outLineStep` and
 * `outPixelStep` are those of the output.
 */
function resizeAxis(input, output, weights, lines, [lineStep, pixelStep], [outLineStep, outPixelStep]) {
  for (let index = 0; index < weights.length; index++) {
    const [first, values] = weights[index];
    for (let line = 0; line < lines; line++) {
      const start = line * lineStep + first * pixelStep;
      let red = 1 << (BITS - 1);
      let green = red;
      let blue = red;
      for (let tap = 0, at = start; tap < values.length; tap++, at += pixelStep) {
        red += input[at] * values[tap];
        green += input[at + 1] * values[tap];
        blue += input[at + 2] * values[tap];
      }
      const to = line * outLineStep + index * outPixelStep;
      output[to] = red >> BITS; // a Uint8ClampedArray clips, as Pillow does
      output[to + 1] = green >> BITS;
      output[to + 2] = blue >> BITS;
      output[to + 3] = 255;
    }
  }
}

/** Resize horizontally, then vertically, and round in between. */
function resize(image, width, height, resample) {
  let { data } = image;
  if (width !== image.width) {
    const across = new Uint8ClampedArray(width * image.height * 4);
    const weights = resamplingWeights(image.width, width, resample);
    resizeAxis(data, across, weights, image.height, [image.width * 4, 4], [width * 4, 4]);
    data = across;
  }
  if (height !== image.height) {
    const down = new Uint8ClampedArray(width * height * 4);
    resizeAxis(data, down, resamplingWeights(image.height, height, resample), width, [4, width * 4], [4, width * 4]);
    data = down;
  }
  return { data, width, height };
}

/** Start of a centered crop: an odd margin is rounded down (transformers), or to the even pixel (torchvision, timm). */
function cropStart(margin, roundsDown) {
  const start = Math.floor(margin / 2);
  return margin % 2 && start % 2 && !roundsDown ? start + 1 : start;
}

function crop(image, [height, width], roundsDown) {
  const top = cropStart(image.height - height, roundsDown);
  const left = cropStart(image.width - width, roundsDown);
  const data = new Uint8ClampedArray(width * height * 4);
  for (let row = 0; row < height; row++) {
    const start = ((top + row) * image.width + left) * 4;
    data.set(image.data.subarray(start, start + width * 4), row * width * 4);
  }
  return { data, width, height };
}

/**
 * Resize and crop an image to the size of the model's input.
 *
 * `image` has `data` (RGBA), `width` and `height`. `steps` are those of page.json: `resize` is the shorter side or
 * [height, width]; `crop` is [height, width] or null; `rounds_crop_down` is how an odd margin is rounded.
 */
export function resizeAndCrop(image, steps) {
  let [height, width] = [].concat(steps.resize, steps.resize);
  if (!Array.isArray(steps.resize)) {
    const shorter = Math.min(image.width, image.height);
    width = Math.trunc((steps.resize * image.width) / shorter);
    height = Math.trunc((steps.resize * image.height) / shorter);
  }
  const resized = resize(image, width, height, steps.resample);
  return steps.crop ? crop(resized, steps.crop, steps.rounds_crop_down ?? true) : resized;
}

/** Rescale and normalize RGBA to a Float32Array (3, height, width). */
export function pixelValues({ data, width, height }, { scale, mean, std }) {
  const values = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const shift = mean ? mean[channel] : 0;
    const spread = std ? std[channel] : 1;
    for (let pixel = 0; pixel < width * height; pixel++) {
      values[channel * width * height + pixel] = (data[pixel * 4 + channel] * scale - shift) / spread;
    }
  }
  return values;
}

const PLAIN_PROCESSORS = ["BitImageProcessor", "DeiTImageProcessor", "ViTImageProcessor"];

/** Read the steps from a preprocessor_config.json, whose class must not have steps of its own. */
export function stepsOf(config) {
  const { size, crop_size: cropSize } = config;
  if (!PLAIN_PROCESSORS.includes(config.image_processor_type) || config.do_resize === false) {
    throw new Error(`image_processor_type must be one of ${PLAIN_PROCESSORS.join(", ")}, with a resize.`);
  }
  return {
    resize: size.shortest_edge ?? [size.height, size.width],
    resample: config.resample,
    crop: config.do_center_crop ? [cropSize.height, cropSize.width] : null,
    rounds_crop_down: !config.pretrained_cfg, // timm's does not
    scale: config.do_rescale === false ? 1 : config.rescale_factor,
    mean: config.do_normalize === false ? null : config.image_mean,
    std: config.do_normalize === false ? null : config.image_std,
  };
}

/**
 * Return a processor for an image classification pipeline of transformers.js.
 *
 * `config` is its preprocessor_config.json, `Tensor` the class of transformers.js:
 * `classifier.processor = pillowProcessor(classifier.processor.image_processor.config, Tensor)`.
 */
export function pillowProcessor(config, Tensor) {
  const steps = stepsOf(config);
  return async (images) => {
    const seen = [].concat(images).map((image) => resizeAndCrop(image.clone().rgba(), steps));
    const [{ width, height }] = seen;
    const data = new Float32Array(seen.length * 3 * width * height);
    seen.forEach((image, index) => data.set(pixelValues(image, steps), index * 3 * width * height));
    return { pixel_values: new Tensor("float32", data, [seen.length, 3, height, width]) };
  };
}
