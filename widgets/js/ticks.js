// Ticks of the charts' axes, in one place for all panels: round numbers, two at least in any range, no text twice.

function niceTicks(low, high, count) {
  if (!(high > low)) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = [1, 2, 5, 10].map((m) => m * power);
  for (let i = steps.findIndex((step) => step >= rough * 0.999); ; i--) {
    const step = i >= 0 ? steps[i] : power / 2;
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-6); k * step <= high + step * 1e-6; k++) ticks.push(+(k * step).toPrecision(12) || 0);
    if (ticks.length > 1 || i < 0) return ticks;
  }
}

function logTicks(low, high) {
  const powers = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) powers.push(e);
  const stride = Math.ceil(powers.length / 7);
  const inside = (firsts) => powers.filter((_, i) => i % stride === 0).flatMap((e) => firsts.map((m) => +(m * 10 ** e).toPrecision(12)))
    .filter((t) => t >= low * 0.999 && t <= high * 1.001);
  for (const firsts of powers.length < 5 ? [[1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]] : [[1], [1, 2, 5]]) {
    const ticks = inside(firsts);
    if (ticks.length > 1) return ticks;
  }
  return niceTicks(low, high, 4).filter((t) => t > 0);
}

// [tick, text] for each, with as many digits as tell them apart; text(tick, digits) starts from `digits`.
function named(ticks, text, digits = 3) {
  for (let d = digits; d < digits + 9; d++) {
    const texts = ticks.map((t) => text(t, d));
    if (new Set(texts).size === texts.length) return ticks.map((t, i) => [t, texts[i]]);
  }
  return ticks.map((t) => [t, String(t)]);
}
