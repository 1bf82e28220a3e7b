/** Hooks that load data, and that load it again while the tab is visible. */

import { signal, useCallback, useEffect, useRef, useState } from "./html.js";

/** Whether the tab is visible. Hidden tabs send no requests. */
export const isVisible = signal(document.visibilityState === "visible");

document.addEventListener("visibilitychange", () => {
  isVisible.value = document.visibilityState === "visible";
});

/**
 * Loads a value when the inputs change.
 * @param {() => Promise<any>} load
 * @param {any[]} inputs
 * @returns the value, the error, whether it is loading, and functions that load or replace it
 */
export function useResource(load, inputs) {
  const [state, setState] = useState({ value: null, error: null, isLoading: true });
  const newest = useRef(0);
  const reload = useCallback(async () => {
    newest.current += 1;
    const mine = newest.current;
    try {
      const value = await load();
      if (mine === newest.current) setState({ value, error: null, isLoading: false });
    } catch (error) {
      if (mine !== newest.current || error.name === "AbortError") return;
      setState((old) => ({ value: old.value, error, isLoading: false }));
    }
  }, inputs);
  const set = useCallback((value) => {
    newest.current += 1; // a response that is on its way is older than this value
    setState({ value, error: null, isLoading: false });
  }, []);
  useEffect(() => {
    setState((old) => ({ ...old, error: null, isLoading: true })); // the old value remains visible
    reload();
    return () => {
      newest.current += 1;
    };
  }, [reload]);
  return { ...state, reload, set };
}

/**
 * Calls a function every few seconds while the tab is visible, and once when it becomes visible.
 * @param {() => Promise<void>} callback
 * @param {number|null} seconds - null: do not call it
 */
export function usePolling(callback, seconds) {
  const latest = useRef(callback);
  latest.current = callback;
  const visible = isVisible.value;
  const wasHidden = useRef(false);
  useEffect(() => {
    if (!visible) {
      wasHidden.current = true;
      return undefined;
    }
    if (seconds === null) return undefined;
    if (wasHidden.current) {
      wasHidden.current = false;
      latest.current();
    }
    let timer = null;
    let isStopped = false;
    const wait = () => {
      timer = setTimeout(async () => {
        await latest.current();
        if (!isStopped) wait();
      }, seconds * 1000);
    };
    wait();
    return () => {
      isStopped = true;
      clearTimeout(timer);
    };
  }, [seconds, visible]);
}

/**
 * Runs an action of the user, one at a time. Returns the action, whether it runs, and its error.
 * @param {(...args: any[]) => Promise<any>} work
 */
export function useAction(work) {
  const [state, setState] = useState({ isBusy: false, error: null });
  const run = async (...args) => {
    setState({ isBusy: true, error: null });
    try {
      const value = await work(...args);
      setState({ isBusy: false, error: null });
      return value;
    } catch (error) {
      setState({ isBusy: false, error: error.name === "AbortError" ? null : error });
      return undefined;
    }
  };
  const clear = () => setState({ isBusy: false, error: null });
  return { run, ...state, clear };
}
