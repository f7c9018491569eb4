// What a model family is: the translation of its Hugging Face config in both directions, and its mapping table. Adding a family
// is one file in families/ and one row in registry.ts. Knows no files: a config is a plain value here.
import type { Rule } from './mapping.js'
import type { TransformerConfig } from './transformerConfig.js'

/** A plain JSON value of a config. Numbers are doubles. */
export type HfValue = null | boolean | number | string | readonly HfValue[] | { readonly [key: string]: HfValue }

/** A config.json as a plain object. */
export type HfConfig = { readonly [key: string]: HfValue }

/** One model family. */
export interface FamilySpec {
  /** Names in `architectures` of config.json. */
  readonly architectures: readonly string[]
  /** `model_type` of config.json. */
  readonly modelType: string
  /** Its forward pass is built: models train and generate. Every family converts. */
  readonly runs: boolean
  /** @throws ERR_HF_CONFIG listing every problem. */
  fromHf(config: HfConfig): TransformerConfig
  /**
   * The HF config of a model. Fields of `source` that mean the same as in `config` stay as they are; all unknown ones stay.
   * @param source - the config that it came from, or null for a new one.
   * @throws ERR_CONFIG when the family cannot express it.
   */
  toHf(config: TransformerConfig, source: HfConfig | null): HfConfig
  /** The mapping table for this variant. */
  rules(config: TransformerConfig): Rule[]
}
