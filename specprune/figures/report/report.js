"use strict";
// Degrees of freedom, widths and cost at the slider's lambda, by the formulas of the package:
// specprune.bounds.degrees_of_freedom, specprune.compress.allocation and specprune.compress.cost.

function degreesOfFreedom(eigenvalues, lam) {
  let sum = 0;
  for (const mu of eigenvalues) {
    if (mu > 0) sum += mu / (mu + lam);
  }
  return sum;
}

// How many nodes stay: the degrees of freedom rounded up, at least one, at most all.
function keptNodes(dof, width) {
  return Math.min(width, Math.max(1, Math.ceil(dof)));
}

// What the theorem asks for; null where lambda exceeds the largest eigenvalue, of which it does not speak.
function theoremWidth(dof, lam, largest) {
  return lam > largest ? null : Math.max(1, Math.ceil(5 * dof * Math.log((16 * dof) / 0.2)));
}

// A network's cost: each term shrinks with what is gone of its inputs and of its outputs.
function costAt(terms, gone) {
  const left = (shares) => 1 - shares.reduce((sum, [group, share]) => sum + share * gone[group], 0);
  return terms.reduce((sum, term) => sum + term.cost * left(term.inputs) * left(term.outputs), 0);
}

// All that depends on lambda, in the names of the tables' columns.
function atLambda(data, lam) {
  const layers = data.layers.map((layer) => {
    const dof = degreesOfFreedom(layer.eigenvalues, lam * layer.trace);
    return { dof, share: dof / layer.eigenvalues.length };
  });
  const groups = data.groups.map((group) => {
    const level = lam * group.trace;
    const dof = degreesOfFreedom(group.eigenvalues, level);
    const width = group.eigenvalues.length;
    const kept = keptNodes(dof, width);
    return { lam: level, dof, kept, share: kept / width, theorem: theoremWidth(dof, level, group.eigenvalues[0]) };
  });
  const gone = groups.map((group) => 1 - group.share);
  const whole = groups.map(() => 0);
  const part = (terms) => (terms === null ? null : costAt(terms, gone) / costAt(terms, whole));
  return { layers, groups, flopsKept: part(data.flops), paramsKept: part(data.params) };
}

// Four significant digits, as in the text tables.
function fourDigits(number) {
  if (number === null) return "-";
  if (Number.isInteger(number) && Math.abs(number) < 10000) return String(number);
  const [digits, power] = number.toExponential(3).split("e");
  const exponent = Number(power);
  const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (exponent >= -4 && exponent < 4) return trimmed(number.toFixed(3 - exponent));
  const size = String(Math.abs(exponent)).padStart(2, "0");
  return `${trimmed(digits)}e${exponent < 0 ? "-" : "+"}${size}`;
}

function start(page) {
  const data = JSON.parse(page.getElementById("data").textContent);
  const slider = page.getElementById("lambda");
  const write = (id, text) => {
    const place = page.getElementById(id);
    if (place) place.textContent = text;
  };
  const fill = (id, records) => {
    records.forEach((record, row) => {
      for (const cell of page.getElementById(id).tBodies[0].rows[row].cells) {
        const value = record[cell.dataset.cell];
        if (value === undefined) continue;
        const count = cell.dataset.cell === "kept" || cell.dataset.cell === "theorem";
        cell.textContent = count && value !== null ? String(value) : fourDigits(value);
      }
    });
  };
  let pause = null;

  function show() {
    const lam = data.lambdas[Number(slider.value)];
    const now = atLambda(data, lam);
    fill("layers", now.layers);
    fill("nodes", now.groups);
    write("now-lambda", fourDigits(lam));
    write("now-widths", now.groups.map((group) => group.kept).join(" "));
    write("now-flops", now.flopsKept === null ? "" : fourDigits(100 * now.flopsKept));
    write("now-params", now.paramsKept === null ? "" : fourDigits(100 * now.paramsKept));
    slider.setAttribute("aria-valuetext", fourDigits(lam));
    for (const mark of page.querySelectorAll("[data-moves]")) {
      const { moves, low, high, from, to } = mark.dataset;
      const along = (Math.log10(lam) - Number(low)) / (Number(high) - Number(low));
      const at = (Number(from) + along * (Number(to) - Number(from))).toFixed(2);
      mark.setAttribute(`${moves}1`, at);
      mark.setAttribute(`${moves}2`, at);
    }
  }

  slider.addEventListener("input", () => {
    show();
    clearTimeout(pause); // a screen reader hears where the slider comes to rest, not every step
    pause = setTimeout(() => write("said", page.getElementById("now").textContent), 500);
  });
  page.getElementById("control").hidden = false;
  show();
}

if (typeof document === "undefined") {
  module.exports = { degreesOfFreedom, keptNodes, theoremWidth, costAt, atLambda, fourDigits };
} else {
  start(document);
}
