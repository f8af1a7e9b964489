// Draws the figures of the report, those in view first, in the colours of the page; redraws when these change.
(function () {
  'use strict';
  const store = JSON.parse(document.getElementById('figures').textContent);
  const root = document.documentElement;
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const coarse = window.matchMedia('(pointer: coarse)').matches;
  const state = {}; // what people chose, by figure

  // Colours are written "@blue" or "@blue/0.3" and looked up in the style sheet, which has a light and a dark set.
  function colour(text) {
    const [name, alpha] = text.slice(1).split('/');
    const hex = getComputedStyle(root).getPropertyValue('--' + name).trim();
    if (alpha === undefined) return hex;
    const part = (start) => parseInt(hex.slice(start, start + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }
  // Ids, names and units come from data, and the library reads markup in every text: <a href> would become a link. This
  // is the one place where a text becomes one that it shows as it is; "@" in front would be taken for a colour by us.
  function plain(text) {
    return String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;').replace(/^@/, '&#64;');
  }
  function resolved(value) {
    if (typeof value === 'string') return value[0] === '@' ? colour(value) : value;
    if (Array.isArray(value)) return typeof value[0] === 'number' ? value : value.map(resolved);
    if (value && typeof value === 'object') {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
    }
    return value;
  }
  function axis(own) {
    return Object.assign({gridcolor: '@line', linecolor: '@soft', zerolinecolor: '@line', tickcolor: '@soft',
      ticks: 'outside', automargin: true, zeroline: false}, own);
  }
  function layout(own) {
    const made = Object.assign({
      autosize: true, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', hovermode: 'closest',
      font: {color: '@ink', size: 13, family: getComputedStyle(document.body).fontFamily},
      margin: {l: 56, r: 12, t: 12, b: 48},
      legend: {orientation: 'h', y: 1.02, yanchor: 'bottom', x: 0},
      hoverlabel: {bgcolor: '@raised', bordercolor: '@soft', font: {color: '@ink'}},
      dragmode: coarse ? false : 'zoom',
      modebar: {bgcolor: 'rgba(0,0,0,0)', color: '@soft', activecolor: '@ink', orientation: 'v'},
    }, own);
    Object.keys(made).filter((key) => /^[xy]axis/.test(key)).forEach((key) => { made[key] = axis(made[key]); });
    if (!made.xaxis) made.xaxis = axis({});
    if (!made.yaxis) made.yaxis = axis({});
    return resolved(made);
  }
  const config = {responsive: true, displayModeBar: coarse ? false : 'hover', displaylogo: false, scrollZoom: false,
    // Named one by one: among the library's own there is one that would send the data to a cloud.
    modeBarButtons: [['zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d', 'toImage']], plotlyServerURL: ''};

  const element = (name) => document.querySelector(`[data-figure="${name}"]`);
  const control = (name, role) => document.querySelector(`[data-controls="${name}"] [data-role="${role}"]`);
  function tell(name, words) {
    const place = document.querySelector(`[data-status="${name}"]`);
    if (place) place.textContent = words;
  }

  // One individual: bands, the typical curve, and the measurements.
  function person(name, figure) {
    const chosen = figure.people[state[name].person];
    const shown = chosen.signals[state[name].signal];
    const signal = figure.signals[state[name].signal];
    const traces = [];
    function band(low, high, tone, label) {
      if (!low) return;
      const common = {x: shown.t, type: 'scatter', mode: 'lines', line: {width: 0}, hoverinfo: 'skip', legendgroup: label};
      traces.push(Object.assign({y: low, showlegend: false}, common));
      traces.push(Object.assign({y: high, fill: 'tonexty', fillcolor: tone, name: label}, common));
    }
    band(shown.new_low, shown.new_high, '@orange/0.28', '95% of new measurements');
    band(shown.low, shown.high, '@blue/0.28', '95% of curves');
    if (shown.typical) {
      traces.push({x: shown.t, y: shown.typical, type: 'scatter', mode: 'lines', name: 'typical individual, same design',
        line: {color: '@soft', width: 1.5, dash: 'dash'}});
    }
    if (shown.middle) {
      traces.push({x: shown.t, y: shown.middle, type: 'scatter', mode: 'lines', name: 'median', line: {color: '@blue', width: 2}});
    }
    (shown.data || []).forEach((kind) => traces.push({x: kind.t, y: kind.y, type: 'scatter', mode: 'markers', name: plain(kind.label),
      marker: {color: '@ink', size: kind.t.length > 40 ? 4 : 7, symbol: kind.symbol}}));
    tell(name, `Individual ${chosen.id}: ${chosen.why}`);
    element(name).setAttribute('aria-label', chosen.alt);
    return {data: traces, layout: {xaxis: {title: {text: plain(figure.time)}}, yaxis: {title: {text: plain(signal.label)}}}};
  }

  // All individuals, two numbers of each; flags choose who is shown.
  function explorer(name, figure) {
    const chosen = state[name];
    const [x, y] = [figure.axes[chosen.x], figure.axes[chosen.y]];
    const rows = figure.ids.map((_, row) => row).filter((row) => !chosen.flags.length ||
      chosen.flags.some((flag) => figure.flags[flag].rows.includes(row)));
    const flagged = new Map();
    figure.flags.forEach((flag) => flag.rows.forEach((row) => flagged.set(row, (flagged.get(row) || []).concat(flag.label))));
    const lines = (row) => [figure.ids[row], ...figure.axes.map((one) =>
      `${one.label}: ${one.values[row] === null ? '–' : one.values[row]}`),
      ...(flagged.has(row) ? [`flagged: ${flagged.get(row).join(', ')}`] : [])];
    const words = (row) => lines(row).map(plain).map((line, place) => place ? line : `<b>${line}</b>`).join('<br>');
    function points(some, label, marker) {
      return {x: some.map((row) => x.values[row]), y: some.map((row) => y.values[row]), type: 'scatter', mode: 'markers',
        name: plain(label), text: some.map(words), customdata: some, hovertemplate: '%{text}<extra></extra>', marker};
    }
    const wanted = chosen.find ? figure.ids.map((_, row) => row).filter((row) => figure.ids[row] === chosen.find) : [];
    const noun = figure.noun || 'individuals';
    const data = [points(rows.filter((row) => !flagged.has(row)), noun, {color: '@blue/0.65', size: 7}),
      points(rows.filter((row) => flagged.has(row)), 'flagged',
        {color: '@vermilion', size: 9, symbol: 'diamond', line: {color: '@paper', width: 1}})];
    if (wanted.length) data.push(points(wanted, chosen.find, {color: '@ink', size: 16, symbol: 'circle-open', line: {width: 3}}));
    const left = figure.total > figure.ids.length ? ` (${figure.ids.length} of ${figure.total} are on the page, all flagged ones first)` : '';
    tell(name, `${rows.length} ${noun} shown${left}.` +
      (chosen.find && !wanted.length ? ` "${chosen.find}" is not among them.` : '') +
      (wanted.length === 1 ? ` ${lines(wanted[0]).join('; ')}.` : ''));
    return {data, layout: {xaxis: {title: {text: plain(x.label)}, type: x.log ? 'log' : 'linear'},
      yaxis: {title: {text: plain(y.label)}, type: y.log ? 'log' : 'linear'}}};
  }

  function made(name) {
    const figure = store[name];
    if (figure.kind === 'fits') return person(name, figure);
    if (figure.kind === 'explorer') return explorer(name, figure);
    return figure;
  }
  async function draw(name) {
    if (!window.Plotly) return; // not there yet: what was chosen is drawn when it is
    const content = made(name);
    await Plotly.react(element(name), resolved(content.data), layout(content.layout || {}), config);
  }

  function chooseFits(name) {
    state[name] = {person: 0, signal: 0};
    const who = control(name, 'person');
    const first = who.options.length ? Number(who.options[0].value) : 0;
    state[name].person = first;
    who.addEventListener('change', () => { state[name].person = Number(who.value); draw(name); });
    const signal = control(name, 'signal');
    if (signal) signal.addEventListener('change', () => { state[name].signal = Number(signal.value); draw(name); });
    [['previous', -1], ['next', 1]].forEach(([role, step]) => control(name, role).addEventListener('click', () => {
      who.selectedIndex = (who.selectedIndex + step + who.options.length) % who.options.length;
      who.dispatchEvent(new Event('change'));
    }));
  }
  function chooseExplorer(name) {
    const figure = store[name];
    state[name] = {x: figure.start[0], y: figure.start[1], flags: [], find: ''};
    ['x', 'y'].forEach((role) => {
      const menu = control(name, role);
      menu.addEventListener('change', () => { state[name][role] = Number(menu.value); draw(name); });
    });
    const find = control(name, 'find');
    find.addEventListener('change', () => { state[name].find = find.value.trim(); draw(name); });
    const boxes = [...document.querySelectorAll(`[data-controls="${name}"] [data-role="flag"]`)];
    boxes.forEach((box) => box.addEventListener('change', () => {
      state[name].flags = boxes.filter((one) => one.checked).map((one) => Number(one.value));
      draw(name);
    }));
  }
  // A click on an individual shows its fit, where it is on the page.
  function follow(name) {
    element(name).on('plotly_click', (event) => {
      const id = store[name].ids[event.points[0].customdata];
      Object.keys(store).filter((other) => store[other].kind === 'fits').forEach((other) => {
        const place = store[other].people.findIndex((one) => one.id === id);
        if (place < 0) {
          tell(name, `Individual ${id} is not among the fits on this page; make the report again with check_fit.individuals=[${id}].`);
          return;
        }
        const menu = control(other, 'person');
        menu.value = String(place);
        menu.dispatchEvent(new Event('change'));
        document.getElementById('figure-' + other).scrollIntoView();
      });
    });
  }

  function redraw() { if (root.dataset.drawn !== undefined) names.forEach(draw); }
  const names = [...document.querySelectorAll('[data-figure]')].map((one) => one.dataset.figure);
  // What somebody looks at is drawn first, wherever on the page that is, and the rest in the order of the page.
  const inView = new Set();
  const watcher = window.IntersectionObserver && new IntersectionObserver((entries) => entries.forEach((entry) => {
    const name = entry.target.dataset.figure;
    if (entry.isIntersecting) inView.add(name); else inView.delete(name);
  }), {rootMargin: '25%'});
  async function drawAll() {
    const left = [...names];
    if (watcher) {
      names.forEach((name) => watcher.observe(element(name)));
      await new Promise((resolve) => setTimeout(resolve, 50)); // its first word comes with the next frame
    }
    while (left.length) {
      await new Promise((resolve) => setTimeout(resolve)); // the page stays usable between figures
      const next = left.findIndex((name) => inView.has(name));
      if (next < 0 && root.dataset.seen === undefined) {
        performance.mark('seen');
        root.dataset.seen = '';
        await new Promise((resolve) => (window.requestIdleCallback || setTimeout)(resolve)); // scrolling goes first
        continue;
      }
      const [name] = left.splice(Math.max(next, 0), 1);
      await draw(name);
      if (watcher) watcher.unobserve(element(name));
      if (store[name].kind === 'explorer' && !state[name].followed) {
        state[name].followed = true;
        follow(name);
      }
    }
    performance.mark('drawn');
    root.dataset.drawn = String(names.length);
  }
  names.forEach((name) => {
    if (store[name].kind === 'fits') chooseFits(name);
    if (store[name].kind === 'explorer') chooseExplorer(name);
  });
  dark.addEventListener('change', () => redraw());
  window.addEventListener('beforeprint', redraw);
  window.addEventListener('afterprint', redraw);
  // The library takes a second to start; verdict and tables are there before it does.
  setTimeout(() => setTimeout(() => {
    const library = document.getElementById('library');
    if (library) {
      const script = document.createElement('script');
      script.textContent = library.textContent;
      document.head.append(script);
    }
    drawAll();
  }));
})();
