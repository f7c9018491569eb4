// What the folder gives to higher layers.
export { applyOverrides, applyYaml, fromYaml, toPlain, toYaml } from './overrides.js'
export { configProblems, type ResolvedConfig, resolve } from './resolve.js'
export {
  freezeConfig,
  isFrozenConfig,
  type RunConfig,
  type RunConfigInit,
  runConfig,
  sectionNames,
} from './runConfig.js'
export * from './sections.js'
