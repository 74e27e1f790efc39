-- A page of Markdown opens like a notebook: its first heading is the title, the quotation below it the description.
function Pandoc(doc)
  if doc.meta.title or #doc.blocks < 2 then return nil end
  local heading, quotation = doc.blocks[1], doc.blocks[2]
  if heading.t ~= "Header" or heading.level ~= 1 or quotation.t ~= "BlockQuote" then return nil end
  doc.meta.title = pandoc.MetaInlines(heading.content)
  doc.meta.description = pandoc.MetaInlines(pandoc.utils.blocks_to_inlines(quotation.content))
  doc.blocks:remove(1)
  doc.blocks:remove(1)
  return doc
end

-- A picture between paragraphs becomes a figure, whose alt text would be lost to the caption that repeats it.
function Image(image)
  if not image.attributes["fig-alt"] then
    image.attributes["fig-alt"] = pandoc.utils.stringify(image.caption)
  end
  return image
end

-- A short piece of code is not broken at its hyphens.
function Code(code)
  local is_one_word = not code.text:find("%s")
  if is_one_word and (utf8.len(code.text) or 99) <= 32 then code.classes:insert("short") end
  return code
end

-- Long code is folded: what it gives matters more to most readers than how.
local FOLDED_FROM = 40  -- lines
function CodeBlock(block)
  local _, ends = block.text:gsub("\n", "\n")
  if ends + 1 < FOLDED_FROM then return nil end
  local text = "\n" .. block.text
  local name = text:match("\nclass ([%w_]+)") or text:match("\ndef ([%w_]+)")
  local summary = (name and name .. ": " or "") .. (ends + 1) .. " lines of code"
  if block.classes:includes("cell-code") then
    if not block.attributes["code-fold"] then
      block.attributes["code-fold"], block.attributes["code-summary"] = "true", summary
    end
    return block
  elseif block.classes:includes("python") and quarto.doc.is_format("html") then  -- a signature
    local open = pandoc.RawBlock("html", "<details><summary>" .. summary .. "</summary>")
    return { open, block, pandoc.RawBlock("html", "</details>") }
  end
end
