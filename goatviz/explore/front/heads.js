export function renderHeads() {}
