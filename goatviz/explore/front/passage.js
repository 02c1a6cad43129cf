export function renderPassage() {}
